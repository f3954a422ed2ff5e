"""What a person sees on stderr: what is being done, what cannot be, and a table at the end."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.status import Status
from rich.table import Table

from bench.alive import WHOLE
from bench.results import Line, best_peer, floor_of
from bench.systems import counted_threads


class Display:
    """A line that changes, notes that stay."""

    def __init__(self, console: Console, status: Status) -> None:
        """``console`` writes to stderr; ``status`` is the line, shown only on a terminal."""
        self._console = console
        self._status = status
        self._noted: set[str] = set()
        self._prefix = ""

    def case(self, name: str) -> None:
        """What is done from now on belongs to this case."""
        self._prefix = name

    def doing(self, what: str) -> None:
        """Show what is being done."""
        self._status.update(f"{self._prefix}: {what}")

    def note(self, text: str) -> None:
        """Say once what stays true."""
        if text not in self._noted:
            self._noted.add(text)
            self._console.print(f"not run: {text}", markup=False, highlight=False, soft_wrap=True)


def ratios(line: Line, lines: Sequence[Line]) -> tuple[float | None, float | None, float | None]:
    """The line's step time over compiled PyTorch's, over the best of PyTorch's, and over its bare products'.

    ``lines`` may hold others; only those of the same case and the same alive factors are looked at.
    """
    same = [other for other in lines if (other.case, other.pattern) == (line.case, line.pattern)]
    peers = [other for other in same if other.amx == line.amx or other.system != "torch-bf16"]
    compiled = next((other for other in same if other.system == "torch-compile"), None)
    return _over(line, compiled), _over(line, best_peer(peers)), _over(line, floor_of(line, same))


def share_of_whole(line: Line, lines: Sequence[Line]) -> float | None:
    """The line's step time over the same system's and setting's with everything alive."""
    wanted = (line.case, line.system, line.setting, WHOLE, line.amx)
    return _over(line, next((other for other in lines if other.key == wanted), None))


def _over(line: Line, other: Line | None) -> float | None:
    return None if other is None else line.step_ms_median / other.step_ms_median


def results_table(case: str, pattern: str, lines: Sequence[Line]) -> Table:
    """One case with the same factors alive, for the terminal."""
    shown = [line for line in lines if (line.case, line.pattern) == (case, pattern)]
    alive = f"{shown[0].alive:.0%} alive ({pattern})" if shown else pattern
    table = Table(title=f"{case}, {alive}", title_justify="left")
    for name in ("system", "setting"):
        table.add_column(name)
    names = ("step ms", "p95", "private MiB", "total MiB", "grad. error", "× compiled", "× best torch", "× products")
    for name in (*names, *(["× all alive"] if pattern != WHOLE else [])):
        table.add_column(name, justify="right")
    for line in shown:
        figures = [f"{ratio:.2f}" if ratio is not None else "–" for ratio in ratios(line, lines)]
        if pattern != WHOLE:
            whole = share_of_whole(line, lines)
            figures.append("–" if whole is None else f"{whole:.2f}")
        private = "–" if line.peak_private_mb is None else f"{line.peak_private_mb:.0f}"
        error = "–" if line.grad_rel_err is None else f"{line.grad_rel_err:.0e}"
        times = [f"{line.step_ms_median:.1f}", f"{line.step_ms_p95:.1f}"]
        table.add_row(line.system, how(line), *times, private, f"{line.peak_total_mb:.0f}", error, *figures)
    return table


def how(line: Line) -> str:
    """The setting in full: with the peer's way, and whether AMX was off."""
    threads = "" if line.threads == line.host.get("threads") else counted_threads(line.threads)
    amx = "AMX off" if line.amx == "off" else ""
    return ", ".join(part for part in (line.setting, line.variant, threads, amx) if part)
