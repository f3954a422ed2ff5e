"""Lets a device train when its user's rules allow it, and only as long as they do.

Rules are read anew at every look, so a change takes effect in a running device. A training that is held ends with a
checkpoint: its memory goes back to the system, and when the rules are met again it goes on from there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from edge_runtime.device import events
from edge_runtime.device.display import duration
from edge_runtime.device.eligibility import Conditions, Obstacle, Rules, obstacles, rest_left, unknown
from edge_runtime.device.errors import HeldError
from edge_runtime.device.host import Backoff, Host

LOOK_S = 15.0  # between two looks while it trains
WAIT_S = 60.0  # while it may not: nobody is in a hurry, and a sleeping board should sleep

T = TypeVar("T")


class Gate:
    """The rules of one device at work.

    Args:
        host: Its clock, sleep and conditions.
        rules: The user's, as they are now.
        report: Told what holds the device up, and what cannot.
    """

    def __init__(self, host: Host, rules: Callable[[], Rules], report: Callable[[events.DeviceEvent], None]) -> None:
        self._host, self._rules, self._report = host, rules, report
        self._backoff = Backoff(host, base_s=WAIT_S)
        self._pause_s = 0.0  # that a training which was held must wait at least
        self._told: frozenset[str] = frozenset()

    async def wait(self, round_: int, *, counted_at: float) -> bool:
        """Wait until this device may train; True if it had to.

        Args:
            round_: That it would train.
            counted_at: When an update of it counted last, Unix seconds.
        """
        waited, said = self._pause_s > 0, frozenset[str]()
        if waited:
            await self._host.sleep(self._pause_s)
            self._pause_s = 0.0
        while True:
            rules = self._rules()
            left_s = rest_left(rules, counted_at=counted_at, now=self._host.clock())
            found = obstacles(rules, self._conditions(rules), held=waited)
            if left_s > 0:
                found = (*found, Obstacle("rest", f"it rests after its last update for {duration(left_s)} more"))
            if not found:
                return waited
            if (names := frozenset(obstacle.rule for obstacle in found)) != said:
                self._report(events.Ineligible(round_, found))
                said = names
            waited = True
            await self._host.sleep(min(WAIT_S, left_s) if names == {"rest"} else WAIT_S)

    async def train(self, round_: int, work: Coroutine[Any, Any, T]) -> T:
        """Do ``work`` as long as the device may train.

        Raises:
            HeldError: it may no longer; the work was cancelled, and has ended.
        """
        task = asyncio.ensure_future(work)
        try:
            while True:
                look = asyncio.ensure_future(self._host.sleep(LOOK_S))
                try:
                    await asyncio.wait({task, look}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    look.cancel()
                if task.done():
                    self._backoff.reset()
                    return task.result()
                rules = self._rules()
                if found := obstacles(rules, self._conditions(rules)):
                    break
        except BaseException:
            await _ended(task)
            raise
        await _ended(task)
        if not task.cancelled() and task.exception() is None:
            return task.result()  # it had just ended by itself
        error = HeldError("; ".join(obstacle.text for obstacle in found))
        self._pause_s, _ = self._backoff.next_wait(error)
        self._report(events.Held(round_, found, self._pause_s))
        raise error

    def _conditions(self, rules: Rules) -> Conditions:
        if rules == Rules(rest_s=rules.rest_s):
            return Conditions()  # nothing is measured that no rule asks for
        now = self._host.conditions()
        for line in unknown(rules, now):
            if line not in self._told:
                self._told |= {line}
                self._report(events.Noticed(line))
        return now


async def _ended(task: asyncio.Future[Any]) -> None:
    """Cancel and wait for the end, whatever it is."""
    task.cancel()
    await asyncio.wait({task})
