"""Putting a device together and running it until it ends or a signal stops it."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from edge_runtime.device.client import Client
from edge_runtime.device.errors import InputError, TransportError
from edge_runtime.device.events import Noticed, Waiting
from edge_runtime.device.home import Home
from edge_runtime.device.host import Backoff
from edge_runtime.device.loop import Device, RunOptions, Tools
from edge_runtime.device.records import Identity, Settings
from edge_runtime.device.rekeying import settle
from edge_runtime.wire import NotFoundError, NotPermittedError, SignatureError


async def run_device(home: Home, tools: Tools, options: RunOptions) -> None:
    """Run an enrolled device; the caller holds the home's lock.

    Raises:
        NotEnrolledError: the home has no identity.
        InputError: its server is not to be talked to; see :func:`edge_runtime.device.trust.tls_of`.
        What :meth:`Device.run` raises.
    """
    async with Client.of(await _settled(home, tools, options), tools.host) as client:
        await Device(home, client, tools, options).run()


async def _settled(home: Home, tools: Tools, options: RunOptions) -> Identity:
    """The identity when a change of keys that was begun is over: with the wrong one of two keys nothing else works."""
    backoff = Backoff(tools.host, base_s=options.backoff_s, cap_s=options.backoff_cap_s)
    while True:
        try:
            return await settle(home, host=tools.host)
        except (NotFoundError, NotPermittedError) as error:
            tools.report(Noticed(f"the new key was refused, the old one goes on: {error}"))
            return home.identity()
        except (TransportError, SignatureError) as error:
            retry_s, waited_s = backoff.next_wait(error)
            tools.report(Waiting(type(error).__name__, str(error), waited_s, retry_s))
            await tools.host.sleep(retry_s)


def check_settings(settings: Settings) -> Settings:
    """Demand that there is training data and that every file is there.

    Raises:
        InputError: naming what is missing.
    """
    if not settings.data:
        raise InputError("no training data: pass --data FILE once; it is remembered")
    missing = [name for name in (*settings.data, *settings.evaluation) if not Path(name).is_file()]
    if missing:
        raise InputError(f"{missing[0]}: no such file" + (f" ({len(missing)} missing)" if len(missing) > 1 else ""))
    return settings


def until_signal(work: Coroutine[Any, Any, None], on_signal: Callable[[str], None]) -> int:
    """Run ``work``; the first SIGINT or SIGTERM cancels it in good order, children included.

    Args:
        work: The coroutine to run.
        on_signal: Called with the signal's name when the work has ended because of it.

    Returns:
        0 when the work ended by itself; 130 after SIGINT, 143 after SIGTERM.
    """
    received: list[signal.Signals] = []

    async def main() -> None:
        loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work)

        def stop(number: signal.Signals) -> None:
            if not received:  # a second one must not cut the tidying up short
                received.append(number)
                task.cancel()

        handled = (signal.SIGINT, signal.SIGTERM)
        for number in handled:
            loop.add_signal_handler(number, stop, number)
        try:
            await task
        except asyncio.CancelledError:
            if not received:
                raise
        finally:
            for number in handled:
                loop.remove_signal_handler(number)

    asyncio.run(main())
    if not received:
        return 0
    on_signal(received[0].name)
    return 128 + received[0]
