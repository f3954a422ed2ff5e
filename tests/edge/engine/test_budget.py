"""What a memory budget is spent on."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.engine import runtime
from edge_runtime.engine.budget import Allowance, KeptSizes, default_budget_mb, share_out

MB = 1 << 20


def test_weights_come_first() -> None:
    """They stay if they fit; if not, the whole budget is for activations."""
    assert share_out(100, 30 * MB) == Allowance(resident=True, activations=70 * MB)
    assert share_out(20, 30 * MB) == Allowance(resident=False, activations=20 * MB)
    assert share_out(0, 1) == Allowance(resident=False, activations=0)
    assert share_out((30 * MB + 1) / MB, 30 * MB + 1) == Allowance(resident=True, activations=0)


def test_the_default_is_a_share_of_free_memory() -> None:
    """More than nothing, less than all of it."""
    budget = default_budget_mb()
    assert 64 < budget < 1 << 22
    assert share_out(None, 0).activations > 0


def test_sizes_are_learned_and_scale_with_examples() -> None:
    """Unknown sizes are let be; a known one counts for every block of its length, times the examples."""
    sizes = KeptSizes(100)
    assert sizes.first_kept(["a", "b", "b"], (2, 8)) == 0
    sizes.learn("b", (2, 8), 60)  # 30 an example
    assert sizes.first_kept(["a", "b", "b"], (1, 8)) == 0
    assert sizes.first_kept(["a", "b", "b"], (2, 8)) == 2
    assert sizes.first_kept(["a", "b", "b"], (2, 16)) == 0  # another length
    sizes.learn("a", (1, 8), 45)
    assert sizes.first_kept(["a", "b", "b"], (1, 8)) == 1


def test_only_another_size_is_news() -> None:
    """The same again is none, nor is it for twice the examples; another length is."""
    sizes = KeptSizes(100)
    assert sizes.learn("a", (1, 8), 30)
    assert not sizes.learn("a", (1, 8), 30)
    assert not sizes.learn("a", (2, 8), 60)
    assert sizes.learn("a", (1, 16), 30)
    assert sizes.learn("a", (2, 8), 50)


@given(budget=st.integers(0, 200), size=st.integers(0, 60), blocks=st.integers(0, 8), examples=st.integers(1, 4))
def test_kept_blocks_fit_and_no_more_would(budget: int, size: int, blocks: int, examples: int) -> None:
    """Of equal blocks as many as fit are kept; with no budget none."""
    sizes = KeptSizes(budget)
    sizes.learn("x", (1, 4), size)
    kept = blocks - sizes.first_kept(["x"] * blocks, (examples, 4))
    if budget == 0:
        assert kept == 0
        return
    assert kept * size * examples <= budget
    assert kept == blocks or (kept + 1) * size * examples > budget


@pytest.mark.parametrize("tight", [False, True])
def test_temporaries_are_one_block_only_when_memory_is_tight(monkeypatch: pytest.MonkeyPatch, tight: bool) -> None:
    """One block of all temporaries is larger than a heap takes, and would come from the system at every run."""
    opened: list[bool] = []

    class Session:
        def __init__(self, model: bytes, options: Any, **_: Any) -> None:
            opened.append(options.enable_mem_pattern)

    monkeypatch.setattr(runtime.ort, "InferenceSession", Session)
    try:
        runtime.choose_allocation(tight=tight)
        runtime.open_session(b"")
    finally:
        runtime.choose_allocation(tight=False)
    assert opened == [tight]
