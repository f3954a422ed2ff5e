"""What is alive in a measured step, as the command line says it."""

from __future__ import annotations

import pytest

from bench.alive import parse_alive
from bench.errors import RequestError
from bench.shapes import MODELS, SLOTS

SHAPE = MODELS["llama-6"]


def test_everything_alive() -> None:
    (alive,) = parse_alive("1", SHAPE.modules)
    assert set(alive.factors.values()) == {"AB"}
    assert alive.fraction == 1.0


@pytest.mark.parametrize(("text", "count"), [("1/6", 7), ("1/2", 21), ("3/4", 32), ("1/4", 11), ("1/1000", 1)])
def test_a_part_is_alive_from_the_top(text: str, count: int) -> None:
    """Halves round up, and something is always alive."""
    (alive,) = parse_alive(text, SHAPE.modules)
    dead, living = SHAPE.modules[:-count], SHAPE.modules[-count:]
    assert alive.factors == {**dict.fromkeys(dead, ""), **dict.fromkeys(living, "AB")}
    assert alive.fraction == pytest.approx(count / 42)


def test_scattered_kills_half_and_always_the_same() -> None:
    (alive,) = parse_alive("scattered", SHAPE.modules)
    assert alive == parse_alive("scattered", SHAPE.modules)[0]
    assert alive.fraction == 0.5
    blocks = [{alive.factors[f"model.layers.{block}.{slot}"] for slot in SLOTS} for block in range(SHAPE.layers)]
    assert blocks.count({"AB"}) + blocks.count({""}) < 3, "the kills are not scattered over the blocks"


@pytest.mark.parametrize(("text", "dead"), [("1", False), ("B", False), ("6/7", False), ("5/6", True), ("1/6", True)])
def test_there_is_a_block_below_the_lowest_alive_one_when_all_of_the_first_is_dead(text: str, dead: bool) -> None:
    """Six of the seven modules of the first block are dead with 6/7 alive, and all with 5/6."""
    (alive,) = parse_alive(text, SHAPE.modules)
    assert alive.lowest_block_dead is dead


@pytest.mark.parametrize("factor", ["A", "B"])
def test_one_factor_of_every_module(factor: str) -> None:
    (alive,) = parse_alive(factor, SHAPE.modules)
    assert set(alive.factors.values()) == {factor}
    assert alive.fraction == 0.5


def test_a_list_keeps_its_order_and_drops_repeats() -> None:
    assert [alive.pattern for alive in parse_alive("1, B,1/6,1", SHAPE.modules)] == ["1", "B", "1/6"]


@pytest.mark.parametrize("text", ["", "0", "-1/2", "7/6", "half", "1/0", "AB", "1;1/2"])
def test_what_means_nothing_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="--alive: expected a fraction"):
        parse_alive(text, SHAPE.modules)
