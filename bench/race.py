"""Measures entries: the best way of each peer first, then turns of a few steps until every system had its share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import numpy as np
from msgspec.structs import replace as replaced

from bench.display import Display
from bench.entries import Entry, Request, fewer_threads, variants, way, work_folder
from bench.errors import UnavailableError
from bench.host import commit, describe_host
from bench.process import Contestant
from bench.results import Line, gradient_error
from bench.shapes import CASES
from bench.systems import Setup, System, label

STEPS = 4  # a turn
_TRIAL_STEPS = 8
Start = Callable[[Setup, Path], Contestant]


@dataclass(frozen=True)
class Racer:
    """An entry with the way that was chosen for it, and the medians of the ways tried, in ms."""

    entry: Entry
    tried: dict[str, float]


class Race:
    """Measures the entries of one case."""

    def __init__(
        self, request: Request, display: Display, clock: Callable[[], datetime], start: Start = Contestant
    ) -> None:
        """Nothing runs yet.

        Args:
            request: What was asked for.
            display: Told what happens.
            clock: Says when a row was measured.
            start: Starts a contestant, which writes its files into the folder it is given.
        """
        self._request = request
        self._display = display
        self._clock = clock
        self._start = start
        self._folder = work_folder(request.out)
        # The best way of a peer, found with the first of its entries: kills do not change it.
        self._ways: dict[tuple[System, str], tuple[Setup, dict[str, float]]] = {}

    def make_reference(self, entry: Entry) -> None:
        """Let the reference system write its gradients, unless they are there already."""
        if entry.reference.exists():
            return
        self._display.doing(f"{entry.setup.system} makes the gradients that the others are compared with")
        try:
            self._start(entry.setup, self._folder).close()
        except UnavailableError as error:
            self._display.note(f"no gradients to compare with: {error}")

    def lines(self, entries: Sequence[Entry]) -> Iterator[Line]:
        """Let the entries take turns; one that cannot be run is noted and left out."""
        racers = [self._tuned(entry) for entry in entries]
        with ExitStack() as stack:
            running: list[tuple[Racer, Contestant]] = []
            for racer in racers:
                setup = racer.entry.setup
                self._display.doing(f"{setup.system} ({setup.setting}) starts")
                try:
                    running.append((racer, stack.enter_context(self._start(setup, self._folder))))
                except UnavailableError as error:
                    self._display.note(str(error))
            self._take_turns(entries[0].case, [contestant for _, contestant in running])
            for racer, contestant in running:
                if contestant.alive:
                    yield _line(racer, contestant, self._request, self._clock())

    def _take_turns(self, case: str, contestants: Sequence[Contestant]) -> None:
        """Each turn begins with another one, so that nobody always follows the same."""
        turns = self._request.turns_of(case)
        for turn in range(turns):
            for place in range(len(contestants)):
                contestant = contestants[(place + turn) % len(contestants)]
                if not contestant.alive:
                    continue
                setup = contestant.setup
                self._display.doing(f"turn {turn + 1} of {turns}: {setup.system} ({setup.setting})")
                try:
                    contestant.run(STEPS)
                except UnavailableError as error:
                    self._display.note(str(error))

    def _tuned(self, entry: Entry) -> Racer:
        """The entry with the best of its ways."""
        given = entry.setup
        if not self._request.tune or (len(variants(given)) == 1 and not fewer_threads(given)):
            return Racer(entry, {})
        key = (given.system, entry.amx)
        if key not in self._ways:
            tried: dict[str, float] = {}
            best = self._fastest(variants(given), given, tried)
            self._ways[key] = self._fastest(fewer_threads(best), best, tried), tried
        best, tried = self._ways[key]
        return Racer(replace(entry, setup=replaced(given, variant=best.variant, threads=best.threads)), tried)

    def _fastest(self, setups: Sequence[Setup], best: Setup, tried: dict[str, float]) -> Setup:
        """Try some ways and add their medians to ``tried``; ``best`` is returned when none is faster."""
        for setup in setups:
            self._display.doing(f"{setup.system}: trying {way(setup)}")
            try:
                with self._start(setup, self._folder) as contestant:
                    contestant.run(_TRIAL_STEPS)
                    tried[way(setup)] = round(contestant.median_ms, 2)
            except UnavailableError as error:
                self._display.note(f"{way(setup)}: {error}")
            else:
                best = setup if tried[way(setup)] == min(tried.values()) else best
        return best


def _line(racer: Racer, contestant: Contestant, request: Request, when: datetime) -> Line:
    entry, setup = racer.entry, racer.entry.setup
    private = contestant.last["peak_private_mb"]
    error = gradient_error(Path(setup.gradients), entry.reference)
    return Line(
        case=entry.case,
        system=setup.system,
        setting=label(setup.system, setup.setting),
        alive=round(entry.alive.fraction, 4),
        step_ms_median=round(contestant.median_ms, 2),
        step_ms_p95=round(float(np.percentile(contestant.times, 95)), 2),
        peak_private_mb=None if private is None else round(private, 1),
        peak_total_mb=round(contestant.last["peak_total_mb"], 1),
        grad_rel_err=None if error is None else float(f"{error:.3g}"),
        host=describe_host(request.threads),
        commit=commit(),
        quick=request.quick,
        model=CASES[entry.case].model,
        pattern=entry.alive.pattern,
        threads=setup.threads,
        variant=setup.variant,
        amx=entry.amx,
        steps=len(contestant.times),
        tried=racer.tried,
        when=when.isoformat(timespec="seconds"),
        runtime_ms_median=_median([told.runtime_ms for told in contestant.inside]),
        optimizer_ms_median=_median([told.optimizer_ms for told in contestant.inside]),
        other_ms_median=_median(_other_ms(contestant)),
        kept_mb=_median([told.kept_mb for told in contestant.inside]),
    )


def _other_ms(contestant: Contestant) -> list[float]:
    """What of every step neither ONNX Runtime nor the optimizer took."""
    if not contestant.inside:
        return []
    pairs = zip(contestant.times, contestant.inside, strict=True)
    return [step_ms - told.runtime_ms - told.optimizer_ms for step_ms, told in pairs]


def _median(values: Sequence[float]) -> float | None:
    return round(float(np.median(values)), 2) if values else None
