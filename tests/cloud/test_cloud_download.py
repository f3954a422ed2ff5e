"""What devices download: patches that make the plan's adapter, whatever happened, and a master that is not rounded.

Invariants: a patch applied by the device's own code to the adapter of an earlier plan gives the digest of the current
one; it holds no component that is the same; what the task has not changed is the bundle's to the bit; the master is
what a task without rounding has.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import numpy as np
import pytest
from cloud_fleet import Device, Site, make_bundle, values_for

from cloud.download import KEPT_PATCHES
from cloud.errors import DataError, DataMissingError
from cloud.store import OBJECTS, Database
from edge_runtime import wire
from edge_runtime.bundle import Slot, cut_ranks, parse_tensors, read_peft_folder
from edge_runtime.device.artifacts import Request, handle
from edge_runtime.wire.components import quantise, rounded
from edge_runtime.wire.patch_frame import DEFLATED, DIFFERENCES, OWN, PLAIN, PatchFrame, parse_patch

Sites = Callable[..., Awaitable[Site]]

ANNEALING = {"budget_end": 0.4, "initiating_rounds": 2, "final_rounds": 1}
KILLING = ANNEALING | {"budget_end": 0.6, "temperature_start": 5.0, "temperature_end": 1.0}
POLICIES: dict[str, dict[str, Any]] = {
    "fixed": {},
    "smaller rank": {"rank": 2},
    "anneal": {"policy": "anneal", "annealing": ANNEALING},
    "kill-revive": {"policy": "kill-revive", "annealing": KILLING},
    "lora-a2": {"policy": "lora-a2", "annealing": {"budget_end": 0.3}},
}


class Holder:
    """The adapter of a plan as a device holds it, renewed by patches only."""

    def __init__(self, device: Device, folder: Path) -> None:
        self.device, self.folder = device, folder
        folder.mkdir()
        self.path, self.round = device.site.bundle.path("adapter.safetensors"), OWN

    async def follow(self, signed: wire.SignedPlan) -> bytes:
        """Fetch a patch and apply it with the device's code, which checks the digest; the patch."""
        plan = signed.plan
        answer = await self.device.patch(plan.round, since=self.round)
        assert answer.status == 200, answer
        (self.folder / "patch").write_bytes(answer.body)
        out = self.folder / plan.adapter
        request = Request(
            "patch",
            str(self.device.site.bundle.folder),
            plan.bundle,
            str(self.path),
            plan.ranks,
            str(out),
            patch=str(self.folder / "patch"),
            since=self.round,
            round=plan.round,
            makes=plan.adapter,
        )
        assert handle(request).error == ""
        assert hashlib.sha256(out.read_bytes()).hexdigest() == plan.adapter
        self.path, self.round = out, plan.round
        return answer.body

    def tensors(self) -> dict[str, np.ndarray]:
        return parse_tensors(self.path.read_bytes(), what="held")


@pytest.fixture
async def sites() -> AsyncIterator[Sites]:
    """Makes running sites: seven rounds of one device, if nothing else is asked."""
    made = []

    async def make(folder: Path, **task: Any) -> Site:
        made.append(Site.make(folder, **{"rounds": 7, "devices_per_round": 1, **task}))
        await made[-1].start()
        return made[-1]

    yield make
    for site in made:
        await site.close()


async def contribute(device: Device, signed: wire.SignedPlan) -> wire.SignedPlan:
    """One random update, which closes the round; the next plan."""
    values = values_for(device.site, signed, signed.plan.round)
    answer = await device.put(signed, device.seal(signed, device.frame(signed, values)))
    assert answer.status == 201, answer
    after = await device.plan(after=signed.plan.round)
    assert after is not None
    return after


def master_of(site: Site) -> dict[str, np.ndarray]:
    assert site.server is not None
    record = site.server.aggregator._record
    return parse_tensors((site.config.data_path / "blobs" / OBJECTS / record.master).read_bytes(), what="master")


def changed_names(old: dict[str, np.ndarray], new: dict[str, np.ndarray]) -> set[str]:
    return {name for name, values in new.items() if old[name].tobytes() != values.tobytes()}


def frame_of(site: Site, plan: wire.Plan, patch: bytes, since: int) -> PatchFrame:
    manifest = site.bundle.manifest
    layout = wire.adapter_layout(plan.ranks, manifest.features, manifest.head_shapes)
    return parse_patch(patch, since=since, round_=plan.round, digest=plan.adapter, layout=layout)


def marked(site: Site, plan: wire.Plan, patch: bytes) -> set[tuple[str, int]]:
    """The components that a patch from the round before has."""
    parts = frame_of(site, plan, patch, plan.round - 1).parts
    return {(name, number) for name, part in parts.items() for number in part.numbers}


def empty_bytes(site: Site, plan: wire.Plan) -> int:
    """Of a patch that has nothing: a header, and marks of the factors' components, of three classes and their bias."""
    return 56 + (2 * sum(plan.ranks.values()) + len(site.bundle.manifest.labels) + 1 + 7) // 8


def changed_components(old: dict[str, np.ndarray], new: dict[str, np.ndarray]) -> set[tuple[str, int]]:
    """Columns of B, rows of any other matrix, and vectors that are not the same; all of them at another rank."""
    found = set()
    for name, values in new.items():
        for number in range(values.shape["lora_b" in name] if values.ndim == 2 else 1):
            parts = [array.T[number] if "lora_b" in name else array[number] for array in (old[name], values)]
            if values.ndim == 1:
                parts = [old[name], values]
            if old[name].shape != values.shape or parts[0].tobytes() != parts[1].tobytes():
                found.add((name, number))
    return found


@pytest.mark.parametrize("download", ["float32", "int8", "int4"])
@pytest.mark.parametrize("policy", POLICIES)
async def test_patches_make_the_plans_adapter(
    tmp_path: Path, session: aiohttp.ClientSession, sites: Sites, download: str, policy: str
) -> None:
    """From the round before, from three rounds before and from the bundle, with kills, ranks, head and restarts."""
    site = await sites(tmp_path, download=download, **POLICIES[policy])
    one = await site.device(session, "one")
    always, seldom = Holder(one, tmp_path / "always"), Holder(one, tmp_path / "seldom")
    signed = await one.plan()
    assert signed is not None
    seen, sizes = [], []
    while True:
        before = cut_ranks(site.bundle.manifest, always.tensors(), signed.plan.ranks) if not seen else always.tensors()
        patch = await always.follow(signed)
        assert marked(site, signed.plan, patch) == changed_components(before, always.tensors())
        if signed.plan.round % 3 == 0:
            await seldom.follow(signed)
        await Holder(one, tmp_path / f"new-{signed.plan.round}").follow(signed)
        assert (await one.blob(signed.plan.adapter)).body == always.path.read_bytes()
        seen.append(signed.plan)
        sizes.append(len(patch))
        if signed.plan.state == "finished":
            break
        if signed.plan.round in (2, 4):
            await site.restart()
        signed = await contribute(one, signed)
    assert seldom.round == 6
    killed = {m.name for plan in seen[1:-1] for m in plan.modules if not m.alive}
    ranks = {rank for plan in seen for rank in plan.ranks.values()}
    assert bool(killed) == (policy in ("kill-revive", "lora-a2"))
    assert (len(ranks) > 1) == (policy == "anneal")
    assert sizes[0] == empty_bytes(site, seen[0])  # the bundle's own adapter, cut if need be
    peft = read_peft_folder(site.config.data_path / "published", site.bundle.manifest)
    assert not changed_names(always.tensors(), peft)


async def run(site: Site, session: aiohttp.ClientSession) -> list[dict[str, np.ndarray]]:
    """A task of one device with the same updates whatever is downloaded; every adapter it was handed."""
    one = await site.device(session, "one")
    signed = await one.plan()
    assert signed is not None
    found = []
    while True:
        found.append(parse_tensors((await one.blob(signed.plan.adapter)).body, what="adapter"))
        if signed.plan.state == "finished":
            return found
        signed = await contribute(one, signed)


@pytest.mark.parametrize("download", ["int8", "int4"])
async def test_rounding_does_not_add_up(
    tmp_path: Path, session: aiohttp.ClientSession, sites: Sites, download: str
) -> None:
    """The master is bit for bit the adapter of a task that rounds nothing; what devices get is that, rounded once."""
    bits = {"int8": 8, "int4": 4}[download]
    exact = await sites(tmp_path / "plain")
    expected = await run(exact, session)
    site = await sites(tmp_path / "coarse", download=download)
    handed = await run(site, session)
    assert not changed_names(expected[-1], master_of(site))
    own = site.bundle.initial_adapter()
    assert not changed_names(own, handed[0])
    untouched = set(own) - changed_names(own, handed[1])  # round 0 trains B and the head
    assert untouched == {name for name in own if name.endswith("lora_a")}
    for name, values in handed[-1].items():
        assert values.tobytes() == rounded(name, expected[-1][name], bits).tobytes()
        if values.ndim == 2:
            assert (
                0 < np.abs(values - expected[-1][name]).max() <= quantise(name, expected[-1][name], bits)[1].max() / 2
            )
    assert handed[-1]["classifier.bias"].tobytes() == expected[-1]["classifier.bias"].tobytes()


@pytest.mark.parametrize(("download", "share"), [("float32", 1.0), ("int8", 0.25), ("int4", 0.125)])
async def test_a_patch_costs_what_has_changed(
    tmp_path: Path, session: aiohttp.ClientSession, sites: Sites, download: str, share: float
) -> None:
    """Of one alive factor: its codes, some per cent for scales, a header; far below the whole adapter."""
    slots = (Slot("q", 96, 64), Slot("v", 96, 192))
    bundle = make_bundle(tmp_path / "bundle", task="lm", slots=slots, r_max=8)
    site = await sites(tmp_path, bundle=bundle, download=download)
    one = await site.device(session, "one")
    signed = await one.plan()
    assert signed is not None
    trained = sum(4 * 8 * slot.out_features for slot in slots) * 2  # factor B of two blocks
    signed = await contribute(one, signed)
    plain = (await one.patch(1, since=0, plain=True)).body
    assert trained * share <= len(plain) - (56 + 8) <= trained * share * (1.07 if share < 1 else 1)
    assert len(plain) < signed.plan.adapter_bytes * share * 0.7
    patch = (await one.patch(1, since=0)).body
    assert len(patch) < len(plain) if share < 1 else patch == plain
    before = (await site.operator.status()).bytes_down
    await one.patch(1, since=0)
    assert (await site.operator.status()).bytes_down == before + len(patch)


async def test_a_patch_is_of_differences_where_its_start_is_here(
    tmp_path: Path, session: aiohttp.ClientSession, sites: Sites
) -> None:
    """Small updates leave most codes as they are. Where the start is gone, whole codes are deflated; nothing fails."""
    bundle = make_bundle(tmp_path / "bundle", task="lm", slots=(Slot("q", 96, 64), Slot("v", 96, 192)), r_max=8)
    site = await sites(tmp_path, bundle=bundle, download="int4", aggregation="b-only")
    one = await site.device(session, "one")
    signed = await one.plan()
    assert signed is not None
    first = values_for(site, signed, 0)
    holders = {name: Holder(one, tmp_path / name) for name in ("always", "seldom")}
    digests, codings, lengths = [], [], []
    for round_ in range(4):
        values = first / (1 if round_ == 0 else 30)
        assert (await one.put(signed, one.seal(signed, one.frame(signed, values)))).status == 201
        signed = await one.plan(after=signed.plan.round)
        assert signed is not None
        digests.append(signed.plan.adapter)
        since = holders["always"].round
        patch = await holders["always"].follow(signed)
        codings.append(frame_of(site, signed.plan, patch, since).head.coding)
        lengths.append(len(patch))
        if round_ == 0:
            await holders["seldom"].follow(signed)
    assert codings == [DEFLATED, DIFFERENCES, DIFFERENCES, DIFFERENCES]
    assert max(lengths[1:]) < 0.6 * lengths[0]
    (site.config.data_path / "blobs" / OBJECTS / digests[0]).unlink()  # as in a folder that was restored from a copy
    patch = await holders["seldom"].follow(signed)
    assert frame_of(site, signed.plan, patch, 1).head.coding == DEFLATED
    plain = (await one.patch(signed.plan.round, since=1, plain=True)).body
    assert frame_of(site, signed.plan, plain, 1).head.coding == PLAIN
    assert len(patch) < len(plain)


async def test_refusals_have_names(tmp_path: Path, session: aiohttp.ClientSession, sites: Sites) -> None:
    site = await sites(tmp_path)
    one = await site.device(session, "one")
    signed = await one.plan()
    assert signed is not None
    await contribute(one, signed)
    cases = {
        "/v1/tasks/tiny/rounds/0/adapter?since=-1": (409, "RoundClosedError"),
        "/v1/tasks/tiny/rounds/2/adapter?since=1": (404, "NotFoundError"),
        "/v1/tasks/other/rounds/1/adapter?since=0": (404, "NotFoundError"),
        "/v1/tasks/tiny/rounds/1/adapter?since=1": (400, "RequestFormatError"),
        "/v1/tasks/tiny/rounds/1/adapter?since=-2": (400, "RequestFormatError"),
        "/v1/tasks/tiny/rounds/1/adapter": (400, "RequestFormatError"),
        "/v1/tasks/tiny/rounds/1/adapter?since=0&reads=x": (400, "RequestFormatError"),
        "/v1/tasks/tiny/rounds/x/adapter?since=0": (400, "RequestFormatError"),
    }
    for target, expected in cases.items():
        answer = await one.send("GET", target)
        assert (answer.status, answer.problem()) == expected, target
    assert (await one.send("GET", "/v1/tasks/tiny/rounds/1/adapter?since=0", headers={})).status == 400


async def test_the_master_is_kept_and_not_handed_out(
    tmp_path: Path, session: aiohttp.ClientSession, sites: Sites, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Master and the last published adapters are all that is kept; without the master no start."""
    monkeypatch.setattr("cloud.download.KEPT_ADAPTERS", 3)
    site = await sites(tmp_path, download="int8")
    one = await site.device(session, "one")
    plans = [await one.plan()]
    for _ in range(4):
        plans.append(await contribute(one, plans[-1]))
    master = site.server.aggregator._record.master
    adapters = [signed.plan.adapter for signed in plans]
    assert len({*adapters, master}) == 6
    for _ in range(2):  # the same after a start
        found = {name.removeprefix("objects/") for name in site.files() if name.startswith("objects/")}
        assert found == {*adapters[-3:], master}
        assert (await one.blob(master)).status == 404
        assert [(await one.blob(digest)).status for digest in adapters] == [404, 404, 200, 200, 200]
        await site.restart()
    await site.close()
    (site.config.data_path / "blobs" / OBJECTS / master).unlink()
    with pytest.raises(DataMissingError, match=f"blob {master[:12]}: not in"):
        await site.start()


async def test_a_round_that_is_not_committed_is_made_again(
    tmp_path: Path, session: aiohttp.ClientSession, sites: Sites, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blobs are there and the row is not, as after a kill between the two: the same adapter comes out."""
    plain = await sites(tmp_path / "plain", download="int8", rounds=1)
    expected = await run(plain, session)
    site = await sites(tmp_path / "cut", download="int8", rounds=1)
    one = await site.device(session, "one")
    signed = await one.plan()
    assert signed is not None
    whole = Database.end_round

    def cut(*_: object, **__: object) -> None:
        raise DataError("power lost")

    monkeypatch.setattr(Database, "end_round", cut)
    sealed = one.seal(signed, one.frame(signed, values_for(site, signed, 0)))
    assert (await one.put(signed, sealed)).status == 201
    with pytest.raises(DataError, match="power lost"):
        await site.tick()
    await site.close()
    monkeypatch.setattr(Database, "end_round", whole)
    await site.start()
    last = await one.plan(after=0)
    assert last is not None
    found = parse_tensors((await one.blob(last.plan.adapter)).body, what="adapter")
    assert not changed_names(expected[-1], found)


async def test_stopping_changes_nothing(tmp_path: Path, session: aiohttp.ClientSession, sites: Sites) -> None:
    """Updates of the open round are discarded, so its alive factors are not rounded and the last patch is empty."""
    site = await sites(tmp_path, download="int4")
    one = await site.device(session, "one")
    signed = await contribute(one, await one.plan())
    await site.operator.stop()
    last = await one.plan(after=1)
    assert (last.plan.state, last.plan.adapter) == ("finished", signed.plan.adapter)
    assert len((await one.patch(2, since=1)).body) == empty_bytes(site, signed.plan)


async def test_other_bits_in_the_middle_of_a_task(tmp_path: Path, session: aiohttp.ClientSession, sites: Sites) -> None:
    """The open round's adapter stays what its plan says; patches are right all the time, in 32 bits until all is."""
    site = await sites(tmp_path)
    one = await site.device(session, "one")
    holder = Holder(one, tmp_path / "holder")
    signed = await one.plan()
    await holder.follow(signed)
    for download in ("int8", "float32", "int4"):
        signed = await contribute(one, signed)
        task = msgspec.structs.replace(site.config.task, download=download)  # type: ignore[arg-type]
        site.config = msgspec.structs.replace(site.config, task=task)
        await site.restart()
        assert (await one.plan(after=signed.plan.round - 1)).digest == signed.digest
        await holder.follow(signed)
        await Holder(one, tmp_path / f"new-{signed.plan.round}").follow(signed)
    patch = await holder.follow(await contribute(one, signed))
    assert patch[10] == 4


async def test_few_patches_are_in_memory(tmp_path: Path, session: aiohttp.ClientSession, sites: Sites) -> None:
    site = await sites(tmp_path)
    one = await site.device(session, "one")
    signed = await one.plan()
    for _ in range(KEPT_PATCHES + 2):
        signed = await contribute(one, signed)
    made, last = site.server.aggregator._patches._made, signed.plan.round - 1
    first = (await one.patch(signed.plan.round, since=OWN)).body
    await one.patch(signed.plan.round, since=last)
    popular = made[last, True]
    for since in range(signed.plan.round):
        await one.patch(signed.plan.round, since=since)
        await one.patch(signed.plan.round, since=last)
        assert len(made) <= KEPT_PATCHES
    assert made[last, True] is popular  # the one that everybody asks for is made once
    assert (OWN, True) not in made
    assert (await one.patch(signed.plan.round, since=OWN)).body == first
    await contribute(one, signed)
    assert not site.server.aggregator._patches._made


async def test_an_adapter_that_is_tidied_away_is_refused_by_name(
    site: Site, session: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also before devices see the next round: a device that is two rounds late asked for a file that was gone."""
    one, two = await site.device(session, "one"), await site.device(session, "two")
    aggregator, answers = site.server.aggregator, dict[int, list[int | str]]()
    tidy_up, adapters = aggregator._tidy_up, list[str]()

    async def tidy(*what: object) -> None:
        await tidy_up(*what)
        asked = [await one.blob(digest) for digest in adapters]
        answers[len(adapters)] = [answer.status if answer.status == 200 else answer.problem() for answer in asked]

    monkeypatch.setattr(aggregator, "_tidy_up", tidy)
    for round_ in range(3):
        signed = await one.plan(after=round_ - 1)
        adapters.append(signed.plan.adapter)
        for device in (one, two):
            sealed = device.seal(signed, device.frame(signed, values_for(site, signed, round_)))
            assert (await device.put(signed, sealed)).status == 201
    while len(answers) < 3:
        await asyncio.sleep(0.02)
    assert answers == {1: [200], 2: ["NotFoundError", 200], 3: ["NotFoundError", "NotFoundError", 200]}
