"""What a person sees on stderr: what is being done, what cannot be, and a table at the end."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.status import Status
from rich.table import Table

from bench.alive import WHOLE
from bench.results import Line, best_peer, floor_of
from bench.systems import counted_threads, label, parse_setting


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
    """The line's step time over the same system's and setting's with everything alive, where nothing is remembered."""
    setting = label(line.system, parse_setting(line.setting).computed)
    wanted = (line.case, line.system, setting, WHOLE, line.amx)
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
    times = ("step ms", "p95", "optimizer\n+ other")
    sizes = ("private\nMiB", "total\nMiB", "kept\nMiB", "grad.\nerror")
    whole = [] if pattern == WHOLE else ["× all\nalive"]
    for name in (*times, *sizes, "×\ncompiled", "× best\ntorch", "×\nproducts", *whole):
        table.add_column(name, justify="right")
    for line in shown:
        figures = list(ratios(line, lines)) + ([] if pattern == WHOLE else [share_of_whole(line, lines)])
        cells = ["–" if figure is None else f"{figure:.2f}" for figure in figures]
        table.add_row(line.system, how(line), *measured(line), *cells)
    return table


def measured(line: Line) -> list[str]:
    """Median and 95th percentile, shares outside the runtime, private, total and kept memory, gradient error."""
    memory = [_megabytes(size) for size in (line.peak_private_mb, line.peak_total_mb, line.kept_mb)]
    error = "–" if line.grad_rel_err is None else f"{line.grad_rel_err:.0e}"
    return [f"{line.step_ms_median:.1f}", f"{line.step_ms_p95:.1f}", _outside_runtime(line), *memory, error]


def _outside_runtime(line: Line) -> str:
    """Shares of the step, "1.9 + 2.4 %": the optimizer's, and that of everything else but ONNX Runtime's own code."""
    if line.optimizer_ms_median is None or line.other_ms_median is None:
        return "–"
    optimizer, other = (100 * part / line.step_ms_median for part in (line.optimizer_ms_median, line.other_ms_median))
    return f"{optimizer:.1f} + {other:.1f} %"


def _megabytes(size: float | None) -> str:
    """MiB in full, to a tenth below 10; "–" where it is not known."""
    if size is None:
        return "–"
    return f"{size:.1f}" if size < 10 else f"{size:,.0f}"


def how(line: Line) -> str:
    """The setting in full: with the peer's way, and whether AMX was off."""
    threads = "" if line.threads == line.host.get("threads") else counted_threads(line.threads)
    amx = "AMX off" if line.amx == "off" else ""
    return ", ".join(part for part in (line.setting, line.variant, threads, amx) if part)
