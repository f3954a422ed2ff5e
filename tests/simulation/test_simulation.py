"""A thousand random scenarios, none of which breaks an invariant of :mod:`tests.simulation.ledger`."""

from __future__ import annotations

import asyncio
import random

import pytest

from tests.simulation.loop import SimulatedLoop, StuckError
from tests.simulation.ops import Op, random_ops
from tests.simulation.scenario import DEVICES, case
from tests.simulation.server import Task
from tests.simulation.soak import failures

COUNT, SLICES = 1_000, 10


@pytest.mark.slow
@pytest.mark.parametrize("part", range(SLICES))
def test_no_random_scenario_breaks_an_invariant(task: Task, part: int) -> None:
    """100,000 of them are run by ``make soak``."""
    size = COUNT // SLICES
    broken = failures(task, range(part * size, (part + 1) * size))
    assert not broken, "\n".join(broken)


def test_a_printed_case_is_the_list() -> None:
    """The text that is printed for a failure gives the same list."""
    ops = random_ops(random.Random(7), DEVICES)
    names: dict[str, object] = {kind.__name__: kind for kind in Op.__subclasses__()}
    exec(case(ops, 7), names)
    assert names["OPS"] == ops
    assert len(ops) >= 12


def test_what_fails_where_nobody_sees_it_ends_the_scenario() -> None:
    """Otherwise the one who waits for it waits for ever, while others ask again and again."""

    async def wait() -> None:
        loop = asyncio.get_running_loop()
        lost = loop.create_future()
        loop.call_soon(lambda: 1 // 0)
        while not lost.done():
            await asyncio.sleep(60.0)

    loop = SimulatedLoop(random.Random(0))
    try:
        with pytest.raises(StuckError, match="ZeroDivisionError"):
            loop.run_until_complete(wait())
    finally:
        loop.bury()
