"""From what was asked for to what is run: one entry a row of results, with the ways to run it that are tried first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from bench.alive import Alive
from bench.models import Workshop, ort_python
from bench.results import Amx
from bench.shapes import CASES
from bench.systems import FLOOR, REFERENCE, VARIANTS, Setting, Setup, System, chosen_settings, counted_threads


@dataclass(frozen=True)
class Request:
    """What the user asked for.

    Attributes:
        out: Folder of results.
        systems: To run.
        words: That a setting must have.
        threads: At most, of every system.
        turns: Of each system, four steps a turn; None chooses.
        tune: Try the peers' ways first.
        quick: Few turns, fewer settings.
        together: How many processes may take turns.
        amx: Whether the processor has AMX.
    """

    out: Path
    systems: tuple[System, ...]
    words: tuple[str, ...] = ()
    threads: int = 2
    turns: int | None = None
    tune: bool = True
    quick: bool = False
    together: int = 16
    amx: bool = False

    def turns_of(self, case: str) -> int:
        """Turns of each system on a case."""
        if self.turns is not None:
            return self.turns
        quick, full = (3, 12) if CASES[case].together else (1, 3)
        return quick if self.quick else full


@dataclass(frozen=True)
class Entry:
    """One row to measure."""

    case: str
    alive: Alive
    setup: Setup
    amx: Amx
    reference: Path  # gradients to compare with


def make_entry(request: Request, case: str, alive: Alive, system: System, setting: Setting) -> Entry:
    """One row, with model, bundle and adapter made where they are missing.

    Raises:
        UnavailableError: there is no bundle for it.
    """
    size, shop = CASES[case], Workshop(request.out, CASES[case].model)
    name = "-".join([case, system, str(setting).replace(", ", "-"), alive.pattern.replace("/", "_")])
    setup = Setup(
        system=system,
        setting=setting,
        variant=VARIANTS.get(system, ("",))[0],
        shape=size.model,
        model=str(shop.model()),
        bundle=str(shop.bundle(system)) if system.startswith(("emberlora", "ort")) else "",
        python=ort_python() if system == "ort-training" else "",
        adapter="" if system == FLOOR else str(shop.adapter()),
        batch=size.batch,
        tokens=size.tokens,
        factors=alive.factors,
        threads=request.threads,
        amx=True,
        gradients=str(work_folder(request.out) / f"{name}.npz"),
    )
    return Entry(case, alive, setup, "on" if request.amx else "absent", shop.reference(case, alive.pattern))


def settings_of(request: Request, system: System) -> tuple[Setting, ...]:
    """The settings to measure of a system."""
    return chosen_settings(system, request.words, quick=request.quick)


def can_remember(setting: Setting, alive: Alive) -> bool:
    """Whether there is what the setting remembers: a block below the lowest alive one."""
    return setting.lower == "computed" or alive.lowest_block_dead


def with_amx_off(entry: Entry) -> Iterator[Entry]:
    """The row itself, and where AMX helps it, the row without."""
    yield entry
    if entry.amx == "on" and (entry.setup.system == "torch-bf16" or entry.setup.setting.products == "fast"):
        path = Path(entry.setup.gradients)
        setup = msgspec.structs.replace(entry.setup, amx=False, gradients=str(path.with_stem(f"{path.stem}-amx-off")))
        yield Entry(entry.case, entry.alive, setup, "off", entry.reference)


def reference_entry(request: Request, case: str, alive: Alive) -> Entry:
    """What makes the gradients that the others are compared with."""
    entry = make_entry(request, case, alive, REFERENCE, Setting())
    setup = msgspec.structs.replace(entry.setup, gradients=str(entry.reference))
    return Entry(case, alive, setup, entry.amx, entry.reference)


def variants(setup: Setup) -> list[Setup]:
    """The ways to run a peer with all threads; one for our own systems."""
    return [msgspec.structs.replace(setup, variant=name) for name in VARIANTS.get(setup.system, (setup.variant,))]


def fewer_threads(setup: Setup) -> list[Setup]:
    """A peer with half its threads, a quarter, … one."""
    if not setup.system.startswith("torch-"):
        return []
    counts = []
    count = setup.threads // 2
    while count:
        counts.append(count)
        count //= 2
    return [msgspec.structs.replace(setup, threads=count) for count in counts]


def way(setup: Setup) -> str:
    """Names a way of running a peer in ``tried``."""
    threads = counted_threads(setup.threads)
    return f"{setup.variant}, {threads}" if setup.variant else threads


def work_folder(out: Path) -> Path:
    """For the contestants' setups, gradients and error output."""
    folder = out.resolve() / "work"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
