"""What ``emberlora cloud pilot`` prints and writes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from cloud.config import Config
from cloud.console import columns
from cloud.pilot.findings import Findings, Wish
from cloud.pilot.judging import judge
from cloud.pilot.trial import read_trial
from cloud.pilot.wording import HEAD, figures, graded, month_lines, verdict

_MARKS = {True: "ok", False: "FAIL", None: "?"}


async def find(config: Config, wish: Wish, page: Path | None) -> Findings:
    """The findings of the task in this config's data folder; writes ``page`` where it is asked for.

    Raises:
        DataError, BundleError: see :func:`cloud.kept.open_kept`.
    """
    found = judge(await read_trial(config), wish)
    if page is not None:
        from cloud.pilot.page import write_pilot_page  # plotly takes a second to load

        write_pilot_page(page, found)
    return found


def lines(found: Findings, *, as_json: bool) -> list[str]:
    """What to print: one JSON object, or verdict, reasons, devices, suggestion and month."""
    return [msgspec.json.encode(found).decode()] if as_json else list(_text(found))


def _text(found: Findings) -> Iterator[str]:
    yield verdict(found)
    yield from columns([(f"  {_MARKS[r.passed]}", r.about, f"{r.figure} ({r.wanted})") for r in found.reasons])
    yield ""
    rows = [
        (device.name, device.grades.overall, *(text for _, text in graded(device)), *figures(device))
        for device in found.devices
    ]
    yield from columns([HEAD, *rows])
    yield ""
    yield f"Suggested for {found.suggestion.devices} devices; budget: {found.suggestion.note}:"
    yield ""
    yield from found.suggestion.toml.splitlines()
    yield ""
    heading, *rest = month_lines(found.month)
    yield heading + ":"
    yield from (f"  {line}" for line in rest)
