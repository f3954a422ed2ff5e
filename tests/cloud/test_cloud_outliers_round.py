"""Bad devices in a real round: 2 of 20 send the opposite, or a hundred times as much, and are set aside by name.

The aggregator is the real one, asked as its HTTP handlers ask it. The oracle is the same task with the 18 others alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import secrets
import tracemalloc
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner, Result
from cloud_fleet import Device, Site, make_bundle
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from cloud.commands import cloud
from cloud.console import describe
from cloud.errors import DataFullError
from cloud.events import RoundApplied
from cloud.keys import KEYS_FOLDER, load_keys
from cloud.outliers import Outliers
from cloud.planning import plan_layouts
from cloud.service import Aggregator, Surroundings
from cloud.work import start_work, without_outliers
from edge_runtime import wire
from edge_runtime.bundle import Slot

ON: dict[str, object] = {"enabled": True}
NAMES = tuple(f"device-{number:02d}" for number in range(20))
BAD = (NAMES[3], NAMES[11])
CAP = 150


@dataclass
class Run:
    """A task on a site, its aggregator in this process, and who is enrolled."""

    site: Site
    aggregator: Aggregator = field(init=False)
    devices: dict[str, Device] = field(default_factory=dict)

    @classmethod
    async def begin(cls, folder: Path, *, devices: int, outliers: dict[str, object] | None = None, **task: Any) -> Run:
        bundle = make_bundle(folder / "bundle", slots=(Slot("q", 60, 40), Slot("v", 60, 30)))
        sizes = {"devices_per_round": devices, "min_devices": 4, "weight_cap": CAP, "rounds": 2}
        run = cls(Site.make(folder, bundle=bundle, outliers=outliers, **(sizes | task)))
        await run.start()
        return run

    async def start(self) -> None:
        site = self.site
        self.aggregator = Aggregator(
            site.config,
            site.bundle,
            keys=load_keys(site.config.data_path / KEYS_FOLDER),
            folder=site.config.data_path,
            surroundings=Surroundings(site.clock, secrets.token_bytes, site.events.append),
        )
        await self.aggregator.start()

    async def restart(self) -> None:
        await self.aggregator.close()
        await self.start()

    async def plan(self) -> wire.SignedPlan:
        signed = await self.aggregator.plan_after("nobody", task="tiny", after=-1, wait_s=0)
        assert signed is not None
        return signed

    async def send(self, name: str, values: np.ndarray, *, weight: int = 10, tier: int = 0) -> wire.UpdateReceipt:
        """Enrol the device if it is new, and hand its update over."""
        if name not in self.devices:
            await self._enrol(name)
        device, signed = self.devices[name], await self.plan()
        sealed = device.seal(signed, device.frame(signed, values, weight=weight, tier=tier, loss_end=1.0))
        digest = hashlib.sha256(sealed).hexdigest()
        round_ = signed.plan.round
        assert not isinstance(
            await self.aggregator.admit(name, task="tiny", round_=round_, digest=digest), wire.UpdateReceipt
        )
        receipt, new = await self.aggregator.submit(name, round_=round_, digest=digest, sealed=sealed)
        assert new
        return receipt

    async def _enrol(self, name: str) -> None:
        self.devices[name] = device = Device(self.site, None, name)  # type: ignore[arg-type]  # nothing is asked by HTTP
        answer = await self.aggregator.members.make_token(wire.TokenRequest(name, 60))
        request = wire.Enrolment(
            wire.Token.parse(answer.token).secret, name, device.key.public_key().public_bytes_raw().hex()
        )
        await self.aggregator.members.enrol(request, task="tiny")

    async def command(self, *args: str) -> Result:
        """In a thread: a command has an event loop of its own."""
        command = [*args, "--config", str(self.site.folder)]
        return await asyncio.to_thread(CliRunner().invoke, cloud, command)


@contextlib.asynccontextmanager
async def running(folder: Path, **how: Any) -> AsyncIterator[Run]:
    run = await Run.begin(folder, **how)
    try:
        yield run
    finally:
        await run.aggregator.close()


def contributions(run: Run, signed: wire.SignedPlan, *, tier: int = 0) -> dict[str, tuple[np.ndarray, int]]:
    """Of every device: what all have in common, and three times as much of its own; and a weight, one over the cap."""
    layout = plan_layouts(run.site.bundle, signed.plan)[tier]
    rng = np.random.default_rng([17, signed.plan.round])
    common = rng.normal(size=layout.count)
    found = {}
    for number, name in enumerate(NAMES):
        own = 1.5 * rng.normal(size=layout.count)
        found[name] = (0.005 * (common + own)).astype(np.float32), (10 + number if number else 10**15)
    return found


def spoiled(values: np.ndarray, how: str) -> np.ndarray:
    return (-values if how == "flipped" else 100 * values).astype(np.float32)


async def one_round(run: Run, how: str, *, order: Sequence[str] = NAMES, restarts: int = 0) -> None:
    """Every device sends in this order, the bad ones what they should not; then the round ends."""
    given = contributions(run, await run.plan())
    for sent, name in enumerate(order):
        if restarts and sent and sent % (len(order) // (restarts + 1)) == 0:
            await run.restart()
        values, weight = given[name]
        await run.send(name, spoiled(values, how) if name in BAD else values, weight=weight)
    await run.aggregator.tick()


async def of_the_others(folder: Path, **task: Any) -> tuple[str, wire.RoundStatus]:
    """The adapter that the 18 make alone, without any rule, and the round's figures."""
    async with running(folder, devices=18, **task) as run:
        given = contributions(run, await run.plan())
        for name in NAMES:
            if name not in BAD:
                await run.send(name, given[name][0], weight=given[name][1])
        await run.aggregator.tick()
        return (await run.plan()).plan.adapter, (await run.aggregator.status()).history[0]


@pytest.mark.parametrize(("how", "rule"), [("flipped", "direction"), ("hundredfold", "norm")])
@pytest.mark.parametrize("restarts", [0, 3])
async def test_two_of_twenty_are_set_aside_and_the_adapter_is_that_of_the_others(
    tmp_path: Path, how: str, rule: str, restarts: int
) -> None:
    expected, alone = await of_the_others(tmp_path / "alone")
    order = [NAMES[index] for index in np.random.default_rng(restarts).permutation(20)]
    async with running(tmp_path / "all", devices=20, outliers=ON) as run:
        await one_round(run, how, order=order, restarts=restarts)
        (found,) = (await run.aggregator.status()).history
        assert (await run.plan()).plan.adapter == expected
    assert sorted((outlier.device, outlier.rule, outlier.kept) for outlier in found.outliers) == [
        (name, rule, False) for name in BAD
    ]
    assert (found.judged, found.devices, found.weight) == (20, 18, alone.weight)
    assert found.bytes_up > alone.bytes_up
    replaced = msgspec.structs.replace(found, outliers=(), judged=None, bytes_up=alone.bytes_up, seconds=alone.seconds)
    assert replaced == alone


async def test_without_the_rule_they_would_have_counted(tmp_path: Path) -> None:
    expected, _ = await of_the_others(tmp_path / "alone")
    async with running(tmp_path / "all", devices=20) as run:
        await one_round(run, "flipped")
        (found,) = (await run.aggregator.status()).history
        assert (await run.plan()).plan.adapter != expected
    assert (found.outliers, found.judged, found.devices) == ((), None, 20)


async def test_factors_that_are_stacked_are_those_of_the_others(tmp_path: Path) -> None:
    """Updates are opened once more then; those that were set aside are not."""
    expected, _ = await of_the_others(tmp_path / "alone", aggregation="stack")
    async with running(tmp_path / "all", devices=20, outliers=ON, aggregation="stack") as run:
        await one_round(run, "flipped")
        assert (await run.plan()).plan.adapter == expected


async def test_the_operator_is_told_who_and_why(tmp_path: Path) -> None:
    """In the log, which verifies; in status and its figures; plans are as the config asks for."""
    async with running(tmp_path, devices=20, outliers=ON) as run:
        await one_round(run, "hundredfold")
        shown = await run.command("audit", "show", "--kind", "outlier-set-aside", "--json")
        entries = [json.loads(line)["entry"] for line in shown.stdout.splitlines()]
        assert sorted((e["round"], e["device"], e["rule"], e["bound_milli"], e["devices"]) for e in entries) == [
            (0, name, "norm", 5_000, 20) for name in BAD
        ]
        assert all(80_000 < entry["measured_milli"] < 125_000 for entry in entries)
        text = (await run.command("audit", "show", "--device", BAD[0])).stdout
        assert "rule norm, measured " in text
        assert ", bound 5, devices 20, tier 0" in text
        assert (await run.command("audit", "verify")).exit_code == 0
        assert "as signed" in (await run.command("replay")).stdout
        status = await run.aggregator.status()
        told = {device.name: (device.updates, device.set_aside) for device in status.devices}
        assert told == {name: (0, 1) if name in BAD else (1, 0) for name in NAMES}
        (event,) = [event for event in run.site.events if isinstance(event, RoundApplied)]
        assert f"{BAD[0]} set aside: norm " in describe(event)
        assert " times the median of 20, more than 5" in describe(event)
        assert "18 devices" in describe(event)


async def test_what_was_set_aside_is_in_no_trace(tmp_path: Path) -> None:
    async with running(tmp_path, devices=20, outliers=ON) as run:
        await one_round(run, "flipped")
        adapter = (await run.plan()).plan.adapter
        (line,) = (await run.command("audit", "trace", adapter, "--json")).stdout.splitlines()
    assert sorted(update["device"] for update in json.loads(line)["updates"]) == sorted(set(NAMES) - set(BAD))


async def test_the_device_is_told_nothing(tmp_path: Path) -> None:
    """Its update is acknowledged like any other, sent again too, and no plan says more."""
    async with running(tmp_path, devices=20, outliers=ON) as run:
        given = contributions(run, await run.plan())
        receipts = {}
        for name in NAMES:
            values, weight = given[name]
            receipts[name] = await run.send(name, spoiled(values, "flipped") if name in BAD else values, weight=weight)
        await run.aggregator.tick()
        receipt = receipts[BAD[0]]
        assert (receipt.device, receipt.round, receipt.weight) == (BAD[0], 0, 13)
        again = await run.aggregator.admit(BAD[0], task="tiny", round_=0, digest=receipt.digest)
        assert again == receipt
        assert b"device-" not in (await run.plan()).data


async def test_an_edited_verdict_is_found(tmp_path: Path) -> None:
    async with running(tmp_path, devices=20, outliers=ON) as run:
        await one_round(run, "flipped")
        connection = run.aggregator._database._engine.raw_connection()
        connection.cursor().execute("UPDATE rounds SET summary = json_remove(summary, '$.outliers[1]') WHERE round = 0")
        connection.commit()
        connection.close()
        verdict = await run.command("audit", "verify")
        assert verdict.exit_code == 1
        assert f"the store does not say so: update of {BAD[1]} for round 0: set aside" in verdict.output


async def test_a_round_that_cannot_be_stored_yet_is_judged_again_and_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is taken out of the sum twice."""
    expected, _ = await of_the_others(tmp_path / "alone")
    async with running(tmp_path / "all", devices=20, outliers=ON) as run:
        real, tries = run.aggregator._database.end_round, list[int]()

        def end_round(*args: Any, **kwargs: Any) -> None:
            tries.append(1)
            if len(tries) < 3:
                raise DataFullError("no room")
            real(*args, **kwargs)

        monkeypatch.setattr(run.aggregator._database, "end_round", end_round)
        given = contributions(run, await run.plan())
        for name in NAMES:
            values, weight = given[name]
            await run.send(name, spoiled(values, "flipped") if name in BAD else values, weight=weight)
        while len(tries) < 3:
            with contextlib.suppress(DataFullError):
                await run.aggregator.tick()
        assert (await run.plan()).plan.adapter == expected


async def test_where_too_few_would_be_left_the_rest_is_kept_and_named(tmp_path: Path) -> None:
    """19 have to stay: of two that would have to go, the one that is less large does not."""
    async with running(tmp_path, devices=20, outliers=ON, min_devices=19) as run:
        given = contributions(run, await run.plan())
        for name in NAMES:
            values, weight = given[name]
            times = {BAD[0]: 50, BAD[1]: 100}.get(name, 1)
            await run.send(name, (times * values).astype(np.float32), weight=weight)
        await run.aggregator.tick()
        (found,) = (await run.aggregator.status()).history
        assert [(outlier.device, outlier.kept) for outlier in found.outliers] == [(BAD[1], False), (BAD[0], True)]
        assert found.devices == 19
        (event,) = [event for event in run.site.events if isinstance(event, RoundApplied)]
        assert f"{BAD[0]} would be set aside, and is kept because too few were left" in describe(event)
        shown = await run.command("audit", "show", "--kind", "outlier-kept", "--json")
        assert json.loads(shown.stdout)["entry"]["device"] == BAD[0]
        assert (await run.command("audit", "verify")).exit_code == 0


async def test_a_round_of_few_is_not_judged_and_says_so(tmp_path: Path) -> None:
    async with running(tmp_path, devices=20, outliers=ON) as run:
        given = contributions(run, await run.plan())
        for name in NAMES[:7]:
            await run.send(name, spoiled(given[name][0], "hundredfold") if name in BAD else given[name][0])
        run.site.clock.now += 601
        await run.aggregator.tick()
        (found,) = (await run.aggregator.status()).history
        assert (found.judged, found.outliers, found.devices) == (0, (), 7)
        (event,) = [event for event in run.site.events if isinstance(event, RoundApplied)]
        assert "outliers not looked for: too few devices" in describe(event)


async def test_a_tier_of_its_own_does_not_hide_a_device(tmp_path: Path) -> None:
    """One of twelve says that it is weak, and sends the opposite of what the others have learned there."""
    tiers = {"enabled": True, "blocks": [0.5], "memory_mib": [], "step_s": []}
    async with running(tmp_path, devices=12, outliers=ON, tiers=tiers) as run:
        signed = await run.plan()
        layouts = plan_layouts(run.site.bundle, signed.plan)
        given = contributions(run, signed)
        for name in NAMES[:11]:
            await run.send(name, given[name][0])
        parts = layouts[0].split(given[NAMES[11]][0])
        mine = np.concatenate([parts[name].ravel() for name, _ in layouts[1].blocks])
        await run.send(NAMES[11], -mine, tier=1)
        await run.aggregator.tick()
        (found,) = (await run.aggregator.status()).history
    (outlier,) = found.outliers
    assert (outlier.device, outlier.rule, outlier.tier, outlier.devices) == (NAMES[11], "direction", 1, 12)


async def test_a_measuring_round_is_not_judged(tmp_path: Path) -> None:
    """Its sums are as large as a device's examples are many, and point where its classes do."""
    async with running(tmp_path, devices=20, outliers=ON, head_init="class-means", head_init_devices=8) as run:
        signed = await run.plan()
        assert signed.plan.state == "measure"
        (layout,) = plan_layouts(run.site.bundle, signed.plan)
        for number, name in enumerate(NAMES[:8]):
            examples = 1 if number else 5000
            values = np.zeros(layout.count, np.float32)
            parts = layout.split(values)
            parts[wire.CLASS_COUNTS][number % 2] = examples
            parts[wire.CLASS_SUMS][number % 2] = examples
            await run.send(name, values, weight=examples)
        await run.aggregator.tick()
        (found,) = (await run.aggregator.status()).history
        assert (found.state, found.judged, found.outliers, found.devices) == ("measure", None, (), 8)


async def test_memory_does_not_grow_with_the_size_of_updates(tmp_path: Path) -> None:
    """Of each update that came, its imprint alone is kept: about 16 kB, of 400 kB."""
    bundle = make_bundle(tmp_path / "bundle", slots=(Slot("q", 6, 17_000), Slot("v", 6, 17_000)))
    site = Site.make(tmp_path, bundle=bundle, devices_per_round=40, min_devices=4, outliers=ON)
    async with contextlib.AsyncExitStack() as stack:
        run = Run(site)
        await run.start()
        stack.push_async_callback(run.aggregator.close)
        signed = await run.plan()
    work = start_work(site.bundle, signed, key=X25519PrivateKey.generate(), opened=0.0, judged=True)
    rng = np.random.default_rng(0)

    def add(device: int) -> None:
        update = wire.Update(rng.normal(size=work.layout.count).astype(np.float32), 1)
        work.add(f"d{device}", update, work.imprint(update))

    add(0)
    assert work.layout.frame_bytes > 800_000
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for device in range(1, 31):
            add(device)
        assert tracemalloc.get_traced_memory()[0] - before < 30 * 20_000
    finally:
        tracemalloc.stop()
    sifted, verdict = without_outliers(work, [], lambda updates: [], rule=Outliers(enabled=True), least=1)
    assert sifted is work
    assert verdict is not None
    assert verdict.judged == 31


# Bounds that hold for every update


async def test_a_huge_example_count_has_the_weight_of_the_cap(tmp_path: Path) -> None:
    """It is counted, and moves the adapter as the cap says."""
    adapters = []
    for number, claimed in enumerate((2**63, CAP)):
        async with running(tmp_path / str(number), devices=4, min_devices=4) as run:
            given = contributions(run, await run.plan())
            for name in NAMES[:4]:
                receipt = await run.send(name, given[name][0], weight=claimed if name == NAMES[2] else 10)
                assert receipt.weight == (CAP if name == NAMES[2] else 10)
            await run.aggregator.tick()
            adapters.append((await run.plan()).plan.adapter)
    assert adapters[0] == adapters[1]


async def test_a_change_over_the_plans_norm_is_refused_by_name(tmp_path: Path) -> None:
    """The bound stands in the signed plan; replay knows it, too."""
    async with running(tmp_path, devices=4, max_update_norm=2.0) as run:
        signed = await run.plan()
        assert signed.plan.update.max_norm == 2.0
        count = plan_layouts(run.site.bundle, signed.plan)[0].count
        with pytest.raises(wire.UpdateNormError, match=r"update: norm: expected at most 2, got 2.00"):
            await run.send("large", np.full(count, 2.0001 / np.sqrt(count), np.float32))
        await run.send("fitting", np.full(count, 1.9999 / np.sqrt(count), np.float32))
        assert (await run.aggregator.status()).received == 1
        assert "as signed" in (await run.command("replay")).stdout
        path = run.site.folder / "emberlora.toml"
        path.write_text(path.read_text().replace("max_update_norm = 2.0", ""))
        assert "norm: signed at most 2, replayed any" in (await run.command("replay")).stdout
