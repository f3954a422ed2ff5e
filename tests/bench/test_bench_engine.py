"""Our own engine as a contestant, in this process and on a small bundle."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import engine_step
from bench.alive import parse_alive
from bench.clock import RuntimeClock
from bench.engine_step import bundle_engine, engine_options
from bench.errors import UnavailableError
from bench.inside import Inside
from bench.shapes import MODELS, Shape
from bench.systems import Setting, Setup
from edge_runtime.bundle import open_bundle
from edge_runtime.engine.block import OrtValues, Session
from edge_runtime.engine.budget import share_out
from edge_runtime.engine.remembered import RememberedHidden
from edge_runtime.engine.runtime import start_runtime

LLAMA = Shape("llama", 3, 32, 56, 4, 2, 43)  # that of the fixture llama_bundle
BLOCKS, HIDDEN_MB = 3, 4 * 2 * 16 * 32 / (1 << 20)


@pytest.fixture(autouse=True)
def shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Token ids are drawn for the bundle's vocabulary."""
    monkeypatch.setitem(MODELS, "tiny", LLAMA)


@pytest.fixture
def memories(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[RememberedHidden]]:
    """Every memory that is made; a contestant's ends with its process, here it is closed."""
    made: list[RememberedHidden] = []

    def make(*arguments: Any, **more: Any) -> RememberedHidden:
        made.append(RememberedHidden(*arguments, **more))
        return made[-1]

    monkeypatch.setattr(engine_step, "RememberedHidden", make)
    yield made
    for memory in made:
        memory.close()


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Outputs of every session that was run."""
    found: list[tuple[str, ...]] = []
    run = Session.run

    def noted(self: Session, *sources: OrtValues) -> OrtValues:
        found.append(self.outputs)
        return run(self, *sources)

    monkeypatch.setattr(Session, "run", noted)
    return found


def setup(bundle: Path, work: Path, setting: Setting, alive: str = "1/3") -> Setup:
    (choice,) = parse_alive(alive, LLAMA.modules)
    return Setup(
        system="emberlora-fp32",
        setting=setting,
        variant="",
        shape="tiny",
        model="",
        bundle=str(bundle),
        adapter=str(bundle / "adapter.safetensors"),
        batch=2,
        tokens=16,
        factors=choice.factors,
        threads=start_runtime(),
        amx=True,
        gradients=str(work / "gradients.npz"),
    )


def test_a_setting_becomes_the_engines_options(llama_bundle: Path) -> None:
    """Recomputing keeps the weights and not a byte beside them; only a tight engine gives the weights back."""
    bundle = open_bundle(llama_bundle)
    weights = sum(array.nbytes for array in bundle.weights().values())
    assert engine_options(Setting(), bundle) == {"memory_budget_mb": None}
    recompute, tight = (engine_options(Setting(way), bundle)["memory_budget_mb"] for way in ("recompute", "tight"))
    assert (share_out(recompute, weights).resident, share_out(recompute, weights).activations) == (True, 0)
    assert (share_out(tight, weights).resident, share_out(tight, weights).activations) == (False, 0)
    fast = engine_options(Setting("keep", "packed", "fast"), bundle)
    assert fast == {"memory_budget_mb": None, "packed": True, "products": "int8"}


@pytest.mark.parametrize(("alive", "blocks"), [("1", 3), ("1/3", 1)])
def test_recomputing_holds_inputs_and_keeping_more(llama_bundle: Path, tmp_path: Path, alive: str, blocks: int) -> None:
    """One hidden state a trained block and the last output."""
    kept = {}
    for way in ("keep", "recompute", "tight"):
        step, _ = bundle_engine(setup(llama_bundle, tmp_path, Setting(way), alive))  # type: ignore[arg-type]  # a word
        kept[way] = step().kept_mb
    assert kept["recompute"] == kept["tight"] == pytest.approx((blocks + 1) * HIDDEN_MB)
    assert kept["keep"] > kept["recompute"]


def test_what_is_remembered_is_recalled_from_the_first_gradients_on(
    llama_bundle: Path, tmp_path: Path, runs: list[tuple[str, ...]], memories: list[RememberedHidden]
) -> None:
    """They show half precision, and no step runs the two blocks below the lowest alive one."""
    step, wanted = bundle_engine(setup(llama_bundle, tmp_path, Setting()))
    runs.clear()
    step()
    computed = list(runs)
    step, found = bundle_engine(setup(llama_bundle, tmp_path, Setting(lower="remembered")))
    runs.clear()
    step()
    assert computed.count(("out",)) - runs.count(("out",)) == BLOCKS - 1
    assert len(computed) - len(runs) == BLOCKS - 1
    (memory,) = memories
    assert (memory.examples, memory.used_bytes) == (2, 92 + 2 * (52 + 16 * (2 * 32 + 4)))
    flat = [np.concatenate([made[name].ravel() for name in sorted(wanted)]) for made in (wanted, found)]
    assert 1e-6 < np.linalg.norm(flat[1] - flat[0]) / np.linalg.norm(flat[0]) < 2e-3


@pytest.mark.usefixtures("memories")
def test_a_disk_that_takes_nothing_is_said(llama_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of measuring blocks that are computed at every step."""
    monkeypatch.setattr(engine_step, "memory_limit", lambda folder, asked: 2_000)  # an example takes 1,088 bytes
    with pytest.raises(UnavailableError, match="keep, mapped, remembered: only 1 of 2 examples fit"):
        bundle_engine(setup(llama_bundle, tmp_path, Setting(lower="remembered")))


def test_a_step_tells_of_its_inside(llama_bundle: Path, tmp_path: Path) -> None:
    step, _ = bundle_engine(setup(llama_bundle, tmp_path, Setting()))
    told = step()
    assert isinstance(told, Inside)
    assert min(told.runtime_ms, told.optimizer_ms, told.kept_mb) > 0


def test_the_clock_runs_in_every_session_and_only_inside_its_block(
    llama_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: list[tuple[str, ...]]
) -> None:
    """With a clock that goes on by a second whenever it is read, a run takes a second."""
    clocks: list[RuntimeClock] = []

    def make() -> RuntimeClock:
        ticks = count()
        clocks.append(RuntimeClock(now=lambda: float(next(ticks))))
        return clocks[-1]

    step, _ = bundle_engine(setup(llama_bundle, tmp_path, Setting()))
    monkeypatch.setattr(engine_step, "RuntimeClock", make)
    runs.clear()
    step()
    assert clocks[0].seconds == len(runs) > 2 * BLOCKS
    monkeypatch.undo()
    before = clocks[0].seconds
    step()
    assert clocks[0].seconds == before
