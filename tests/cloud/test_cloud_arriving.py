"""Updates on their way: side by side to the disk, together into the database, and nothing left of those refused."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cloud.arriving import Arrival, Arrivals, Counted
from cloud.errors import DataFullError
from cloud.store import UPDATES, Blobs, UpdateRecord
from cloud.store.blobs import Kind
from edge_runtime import wire


def arrival(name: str) -> tuple[Arrival, bytes]:
    sealed = name.encode()
    receipt = wire.UpdateReceipt(device=name, round=0, digest=hashlib.sha256(sealed).hexdigest(), weight=1)
    nothing: Any = None  # what is summed is not looked at here
    return Arrival(nothing, UpdateRecord(receipt, len(sealed), 0.0, wire.LocalMetrics()), nothing, None), sealed


class Round:
    """Counts what is committed; each commit waits until it is let go."""

    def __init__(self, folder: Path) -> None:
        self.commits: list[list[str]] = []
        self.counted: set[str] = set()
        self.refused: dict[str, Exception] = {}
        self.fault: Exception | None = None
        self.go = asyncio.Event()
        self.blobs = Blobs(folder)
        self.arrivals = Arrivals(self.blobs, self.commit, counts=lambda receipt: receipt.digest in self.counted)

    async def commit(self, arrivals: Sequence[Arrival]) -> Sequence[Counted | Exception]:
        receipts = [arrival.record.receipt for arrival in arrivals]
        self.commits.append([receipt.device for receipt in receipts])
        await self.go.wait()
        if self.fault is not None:
            raise self.fault
        found: list[Counted | Exception] = []
        for receipt in receipts:
            refusal = self.refused.get(receipt.device)
            found.append(refusal or (receipt, receipt.digest not in self.counted))
            if refusal is None:
                self.counted.add(receipt.digest)
        return found

    def add(self, name: str) -> asyncio.Task[Counted]:
        return asyncio.create_task(self.arrivals.add(*arrival(name)))

    async def until_committing(self, count: int) -> None:
        while len(self.commits) < count:
            await asyncio.sleep(0.001)


async def test_what_comes_during_a_commit_shares_the_next_one(tmp_path: Path) -> None:
    """The first waits for nobody; the three that come while it is committed are committed together."""
    round_ = Round(tmp_path)
    first = round_.add("a")
    await round_.until_committing(1)
    later = [round_.add(name) for name in "bcd"]
    while len(round_.arrivals._waiting) < 3:
        await asyncio.sleep(0.001)
    round_.go.set()
    assert [(await task)[1] for task in (first, *later)] == [True] * 4
    assert [len(commit) for commit in round_.commits] == [1, 3]
    assert round_.blobs.files(UPDATES) == round_.counted
    assert round_.arrivals.landing == frozenset()


async def test_one_that_is_refused_leaves_nothing_and_the_others_count(tmp_path: Path) -> None:
    round_ = Round(tmp_path)
    round_.refused["b"] = wire.RoundClosedError("closed")
    tasks = [round_.add(name) for name in "ab"]
    round_.go.set()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(outcomes[1], wire.RoundClosedError)
    assert len(round_.counted) == 1
    assert round_.blobs.files(UPDATES) == round_.counted


async def test_a_commit_that_fails_fails_for_all_and_the_next_one_works(tmp_path: Path) -> None:
    round_ = Round(tmp_path)
    round_.fault = DataFullError("no room")
    round_.go.set()
    outcomes = await asyncio.gather(*[round_.add(name) for name in "abc"], return_exceptions=True)
    assert all(isinstance(outcome, DataFullError) for outcome in outcomes)
    assert round_.blobs.files(UPDATES) == frozenset()
    round_.fault = None
    assert (await round_.add("a"))[1]


async def test_the_same_update_twice_at_once_keeps_its_blob(tmp_path: Path) -> None:
    """Both are told the same; the second, which changes nothing, does not take away what the first one needs."""
    round_ = Round(tmp_path)
    round_.go.set()
    assert sorted(new for _, new in await asyncio.gather(round_.add("a"), round_.add("a"))) == [False, True]
    assert round_.blobs.files(UPDATES) == round_.counted


async def test_a_blob_that_cannot_be_written_does_not_take_away_one_that_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device sends again what counts already, and the disk is full by then."""
    round_ = Round(tmp_path)
    round_.go.set()
    await round_.add("a")

    def full(*_: object) -> str:
        raise DataFullError("no room")

    monkeypatch.setattr(Blobs, "write", full)
    with pytest.raises(DataFullError):
        await round_.add("a")
    assert round_.blobs.files(UPDATES) == round_.counted


async def test_names_of_a_group_are_on_the_disk_before_it_is_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for all of it; where the disk does not take them, nobody counts and nothing is left."""
    round_, synced = Round(tmp_path), list[frozenset[str]]()
    real = Blobs.sync_names

    def sync_names(self: Blobs, kind: Kind) -> None:
        real(self, kind)
        synced.append(self.files(kind))

    monkeypatch.setattr(Blobs, "sync_names", sync_names)
    first = round_.add("a")
    await round_.until_committing(1)
    later = [round_.add(name) for name in "bcd"]
    while len(round_.arrivals._waiting) < 3:
        await asyncio.sleep(0.001)
    assert [len(names) for names in synced] == [1]
    round_.go.set()
    await asyncio.gather(first, *later)
    assert [len(names) for names in synced] == [1, 4]

    def full(*_: object) -> None:
        raise DataFullError("no room")

    monkeypatch.setattr(Blobs, "sync_names", full)
    with pytest.raises(DataFullError):
        await round_.add("e")
    assert len(round_.commits) == 2
    assert round_.blobs.files(UPDATES) == round_.counted


async def test_what_is_on_its_way_is_known_and_not_tidied(tmp_path: Path) -> None:
    """Of files that were there, those stay that are needed, half-written ones of them too, and whatever came later."""
    round_ = Round(tmp_path)
    task = round_.add("a")
    await round_.until_committing(1)
    (landing,) = round_.arrivals.landing
    folder = tmp_path / UPDATES
    for name in ("0" * 64, f"{landing}#1"):
        (folder / name).write_bytes(b"x")
    there = round_.blobs.files(UPDATES)
    (folder / ("1" * 64)).write_bytes(b"x")
    round_.blobs.keep_only(UPDATES, set(round_.arrivals.landing), among=there)
    assert round_.blobs.files(UPDATES) == {landing, f"{landing}#1", "1" * 64}
    round_.go.set()
    await task
