"""A real server and real devices over bad networks (:mod:`tests.crash.proxy`): rounds finish, and nothing is lost or
doubled: the invariants of :mod:`tests.crash.ledger`, of which nobody is killed here.

Every byte of the task goes through the proxy: plans, the bundle, adapters and patches, updates and receipts.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.crash.child import WEIGHTS
from tests.crash.ledger import Ledger, demand
from tests.crash.proxy import Toxic, link
from tests.crash.site import DeviceProcess, ServerProcess, free_port, point_homes_at

pytestmark = pytest.mark.slow

_PATIENCE_S = 120.0  # for what takes three seconds
_SILENCE_S = 0.7  # after so long without an answer a device takes a connection for dead; else a minute


async def _until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + _PATIENCE_S
    while not condition():
        demand(time.monotonic() < end, f"it does not happen that {what}")
        await asyncio.sleep(0.02)


async def run(task: Path, folder: Path, *, up: Toxic, down: Toxic, seed: int) -> Counter[str]:
    """Run a task of which every connection goes through a proxy, and check it; what happened to the connections."""
    shutil.copytree(task, folder)
    rng = random.Random(seed)
    port = free_port(rng)
    server = ServerProcess(folder, port)
    devices: list[DeviceProcess] = []
    try:
        await _until(server.answers, "the server answers")
        async with link(port, up=up, down=down, rng=rng) as way:
            point_homes_at(folder, way.own_port)
            devices += [DeviceProcess(folder, name, silence_s=_SILENCE_S) for name in WEIGHTS]
            await _until(lambda: all(device.code is not None for device in devices), "both devices end")
        assert [device.code for device in devices] == [0, 0], (folder / "one.log").read_text()
        updates = folder / "site" / "data" / "blobs" / "updates"
        await _until(lambda: not any(updates.iterdir()), "the server has tidied up")
        assert server.stop() == 0
    finally:
        for process in (server, *devices):
            if process.code is None:
                process.kill()
    Ledger(folder).check_end()
    assert way.surprises == []
    return way.happened


SLOW = Toxic(delay_s=0.01, jitter_s=0.04)
THIN = Toxic(bytes_s=100_000, slice_bytes=1000)


@pytest.mark.parametrize(
    ("up", "down", "sign"),
    [
        pytest.param(SLOW, SLOW, "pieces", id="delay-with-jitter"),
        pytest.param(Toxic(slice_bytes=3), Toxic(slice_bytes=100), "pieces", id="slices"),
        pytest.param(THIN, THIN, "pieces", id="little-bandwidth"),
        pytest.param(Toxic(close_s=0.3), Toxic(close_s=0.3), "slow closes", id="slow-close"),
        pytest.param(Toxic(cut_share=0.5, within_bytes=900), Toxic(), "cuts", id="requests-cut"),
        pytest.param(Toxic(), Toxic(cut_share=0.5, within_bytes=600), "cuts", id="answers-cut"),
        pytest.param(Toxic(), Toxic(cut_share=1, within_bytes=20_000), "cuts", id="downloads-cut"),
        pytest.param(Toxic(silent_share=0.3, within_bytes=900), Toxic(), "silences", id="half-open-requests"),
        pytest.param(Toxic(), Toxic(silent_share=0.3, within_bytes=600), "silences", id="half-open-answers"),
    ],
)
async def test_a_bad_link_loses_and_doubles_nothing(
    crash_task: Path, tmp_path: Path, up: Toxic, down: Toxic, sign: str
) -> None:
    happened = await run(crash_task, tmp_path / "task", up=up, down=down, seed=1)
    assert happened[sign] >= (1 if sign in ("cuts", "silences") else 2 * len(WEIGHTS)), happened


@pytest.mark.parametrize("seed", range(3))
async def test_a_link_with_everything_wrong_loses_and_doubles_nothing(
    crash_task: Path, tmp_path: Path, seed: int
) -> None:
    """Slow, thin, sliced, cut and silent at once, both ways."""
    bad = Toxic(
        delay_s=0.001,
        jitter_s=0.02,
        slice_bytes=2000,
        bytes_s=300_000,
        cut_share=0.2,
        silent_share=0.1,
        within_bytes=3000,
        close_s=0.05,
    )
    happened = await run(crash_task, tmp_path / "task", up=bad, down=bad, seed=seed)
    assert happened["cuts"] + happened["silences"] >= 1
