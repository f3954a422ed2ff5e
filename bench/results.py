"""Lines of results: one JSON object each, appended to a file, the last of a kind counting."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from bench.errors import RequestError
from bench.shapes import CASES
from bench.systems import FLOOR, Setting, System, parse_setting

Amx = Literal["absent", "on", "off"]


class Line(msgspec.Struct, frozen=True):
    """One system in one setting on one case.

    Attributes:
        case: Name of the case.
        system: Who.
        setting: How, in words of :class:`bench.systems.Setting`.
        alive: Alive factors of all factors, from 0 to 1.
        step_ms_median: Forward, backward and optimizer of one step.
        step_ms_p95: The 95th percentile.
        peak_private_mb: MiB since the process began, sampled; None where the system does not tell.
        peak_total_mb: The same with mapped files.
        grad_rel_err: ‖g − g*‖ / ‖g*‖ of all gradients together, g* by PyTorch in float32; None for no gradients. For a
            low-bit base it holds what rounding the weights does.
        host: Processor, cores, threads asked for, versions.
        commit: The checkout's, with + when it was changed.
        quick: Few steps, and peers not tuned.
        model: Name of the shape.
        pattern: What was alive, as asked for.
        threads: That this system ran with.
        variant: Which way of a peer was the best, "" where there is one.
        amx: Whether the processor's AMX tiles could be used.
        steps: Timed ones.
        tried: Median step of every way tried for a peer, in ms.
        when: UTC, ISO 8601.
        runtime_ms_median: Of the same steps: inside ONNX Runtime's own code. This and what follows is None for systems
            that do not tell.
        optimizer_ms_median: In the optimizer.
        other_ms_median: Everything else: Python, binding, transfers.
        kept_mb: MiB of tensors held between the forward and the backward pass.
    """

    case: str
    system: System
    setting: str
    alive: float
    step_ms_median: float
    step_ms_p95: float
    peak_private_mb: float | None
    peak_total_mb: float
    grad_rel_err: float | None
    host: dict[str, str | int | None]
    commit: str
    quick: bool
    model: str
    pattern: str
    threads: int
    variant: str
    amx: Amx
    steps: int
    tried: dict[str, float]
    when: str
    runtime_ms_median: float | None = None
    optimizer_ms_median: float | None = None
    other_ms_median: float | None = None
    kept_mb: float | None = None

    def __post_init__(self) -> None:
        if self.case not in CASES:
            raise ValueError(f"case: expected one of {', '.join(CASES)}, got {self.case}")
        parse_setting(self.setting)

    @property
    def key(self) -> tuple[str, ...]:
        """Equal for two lines of which the later replaces the earlier."""
        return (self.case, self.system, self.setting, self.pattern, self.amx)


def read_lines(path: Path) -> list[Line]:
    """The last line of every kind, in the order in which the kinds first appeared.

    Raises:
        RequestError: no such file, or a line is not one.
    """
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
        return latest(msgspec.json.decode(text, type=Line) for text in texts)
    except FileNotFoundError as error:
        raise RequestError(f"{path}: no such file: nothing was measured yet") from error
    except msgspec.DecodeError as error:
        raise RequestError(f"{path}: not a file of results: {error}") from error


def latest(lines: Iterable[Line]) -> list[Line]:
    """The last line of every kind."""
    return list({line.key: line for line in lines}.values())


def gradient_error(path: Path, reference: Path) -> float | None:
    """Relative error of all gradients together, ‖g − g*‖ / ‖g*‖; None without gradients or reference.

    Raises:
        RequestError: the two files hold other tensors.
    """
    if not (path.exists() and reference.exists()):
        return None
    with np.load(path) as found, np.load(reference) as wanted:
        if not found.files:
            return None
        names = sorted(wanted.files)
        if sorted(found.files) != names:
            raise RequestError(f"{path.name}: holds {len(found.files)} gradients, {reference.name} {len(names)}")
        got = np.concatenate([found[name].ravel() for name in names])
        expected = np.concatenate([wanted[name].ravel() for name in names])
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def is_peer(line: Line) -> bool:
    """Whether the line is one of PyTorch's."""
    return line.system.startswith("torch-")


def best_peer(lines: Iterable[Line]) -> Line | None:
    """The fastest of PyTorch's lines."""
    return min((line for line in lines if is_peer(line)), key=lambda line: line.step_ms_median, default=None)


def floor_of(line: Line, lines: Iterable[Line]) -> Line | None:
    """The bare products for a line: those of its own setting where they were measured, else kept and mapped."""
    floors = {parse_setting(other.setting): other for other in lines if other.system == FLOOR}
    wanted = parse_setting(line.setting).needed
    return floors.get(wanted) or floors.get(Setting(lower=wanted.lower))
