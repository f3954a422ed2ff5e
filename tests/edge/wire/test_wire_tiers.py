"""Tiers: the bytes of plan and frame, what each tier carries, who takes which, and every way to be wrong."""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from itertools import pairwise

import msgspec
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.wire import (
    Layout,
    ModulePlan,
    Plan,
    PlanFormatError,
    Quantisation,
    SignedPlan,
    Tier,
    Update,
    UpdateFormatError,
    UpdateLayoutError,
    choose_tier,
    decode_update,
    encode_update,
    layout_for,
    open_plan,
    sign_plan,
    tier_layouts,
)

FEATURES = {"layer.0.query": (3, 2), "layer.1.query": (3, 2)}
PLACES = {"layer.0.query": 0, "layer.1.query": 1}
HEAD = {"classifier.bias": (2,)}
TIERS = (Tier(0, max_rank=1, memory_mib=2048, step_s=1.5), Tier(1, max_rank=1, memory_mib=512))

PLAN_END = (
    b'"min_examples":1,"tier":0,'
    b'"tiers":[{"lowest_block":0,"max_rank":1,"memory_mib":2048,"step_s":1.5},'
    b'{"lowest_block":1,"max_rank":1,"memory_mib":512}]}'
)
LAYOUT_TEXT = b"layer.0.query.lora_a 1x3\nlayer.0.query.lora_b 2x1\nlayer.1.query.lora_b 2x1\nclassifier.bias 2\n"
FRAME_HEAD = (
    "454d424552555044"  # 0: "EMBERUPD"
    "0100"  # 8: version 1
    "0100"  # 10: tier 1
    "07000000"  # 12: round 7
)


@pytest.fixture(scope="module")
def tiers_plan(plan: Plan, signing_key: Ed25519PrivateKey) -> SignedPlan:
    return sign_plan(msgspec.structs.replace(plan, tiers=TIERS), signing_key)


@pytest.fixture(scope="module")
def layouts(tiers_plan: SignedPlan) -> tuple[Layout, ...]:
    return layouts_of(tiers_plan.plan)


def layouts_of(plan: Plan) -> tuple[Layout, ...]:
    return tier_layouts(plan, features=FEATURES, places=PLACES, head=HEAD)


def update_of(update: Update, layout: Layout) -> Update:
    metrics = dataclasses.replace(update.metrics, tier=layout.tier)
    return Update(np.arange(layout.count, dtype=np.float32) / 4, update.weight, metrics)


def test_plan_bytes(tiers_plan: SignedPlan, signing_key: Ed25519PrivateKey) -> None:
    """The field stands last, with what is left out left out, and a plan without it has none of these bytes."""
    assert tiers_plan.data.endswith(PLAN_END)
    assert open_plan(tiers_plan.data, signing_key.public_key()).plan == tiers_plan.plan


def test_frame_bytes(tiers_plan: SignedPlan, layouts: tuple[Layout, ...], update: Update) -> None:
    layout = layouts[1]
    assert layout.digest() == hashlib.sha256(LAYOUT_TEXT).digest()
    frame = encode_update(update_of(update, layout), signed_plan=tiers_plan, layout=layout)
    values = struct.pack("<9f", *(number / 4 for number in range(9)))
    assert frame[:16].hex() == FRAME_HEAD
    assert frame[16:80] == bytes.fromhex(tiers_plan.digest) + layout.digest()
    assert frame[80 : 88 + 4 * 9] == struct.pack("<Q", 9) + values
    assert len(frame) == layout.frame_bytes == 148 + 4 * 9


@pytest.mark.parametrize("tier", [0, 1, 2])
def test_a_frame_is_read_as_its_tier_says(
    tiers_plan: SignedPlan, layouts: tuple[Layout, ...], update: Update, tier: int
) -> None:
    mine = update_of(update, layouts[tier])
    frame = encode_update(mine, signed_plan=tiers_plan, layout=layouts[tier])
    layout = layout_for(frame, layouts)
    decoded = decode_update(frame, signed_plan=tiers_plan, layout=layout)
    assert (layout.tier, decoded.metrics) == (tier, mine.metrics)
    np.testing.assert_array_equal(decoded.values, mine.values)


def test_what_each_tier_carries(layouts: tuple[Layout, ...]) -> None:
    assert [layout.blocks for layout in layouts] == [
        (
            ("layer.0.query.lora_a", (2, 3)),
            ("layer.0.query.lora_b", (2, 2)),
            ("layer.1.query.lora_b", (2, 1)),
            ("classifier.bias", (2,)),
        ),
        (
            ("layer.0.query.lora_a", (1, 3)),
            ("layer.0.query.lora_b", (2, 1)),
            ("layer.1.query.lora_b", (2, 1)),
            ("classifier.bias", (2,)),
        ),
        (("layer.1.query.lora_b", (2, 1)), ("classifier.bias", (2,))),
    ]
    assert [layout.components for layout in layouts] == [
        {},
        {"layer.0.query.lora_a": (0,), "layer.0.query.lora_b": (0,)},
        {},
    ]


def test_of_listed_components_the_first_are_carried(plan: Plan) -> None:
    modules = (ModulePlan("layer.0.query", 6, "A", (1, 3, 5)), ModulePlan("layer.1.query", 6, ""))
    asked = msgspec.structs.replace(plan, modules=modules, head_alive=False, tiers=(Tier(0, max_rank=2),))
    layout = layouts_of(asked)[1]
    assert (layout.blocks, layout.components) == (
        (("layer.0.query.lora_a", (2, 3)),),
        {"layer.0.query.lora_a": (1, 3)},
    )


def test_ranges_go_with_their_blocks(plan: Plan) -> None:
    asked = msgspec.structs.replace(plan, tiers=TIERS, quantisation=Quantisation(8, (1.0, 2.0, 3.0, 4.0)))
    assert [layout.quantisation and layout.quantisation.ranges for layout in layouts_of(asked)] == [
        (1.0, 2.0, 3.0, 4.0),
        (1.0, 2.0, 3.0, 4.0),
        (3.0, 4.0),
    ]


@pytest.mark.parametrize("claimed", [0, 2, 3, 65535])
def test_a_frame_that_claims_another_tier_is_refused(
    tiers_plan: SignedPlan, layouts: tuple[Layout, ...], update: Update, claimed: int
) -> None:
    """One that the plan has not by its number, one that it has by what it carries."""
    frame = encode_update(update_of(update, layouts[1]), signed_plan=tiers_plan, layout=layouts[1])
    hostile = frame[:10] + struct.pack("<H", claimed) + frame[12:]
    error = UpdateLayoutError if claimed < 3 else UpdateFormatError
    with pytest.raises(error, match="layout" if claimed < 3 else f"tier: expected 0, .* got {claimed}"):
        decode_update(hostile, signed_plan=tiers_plan, layout=layout_for(hostile, layouts))


def test_a_short_frame_has_no_tier(tiers_plan: SignedPlan, layouts: tuple[Layout, ...]) -> None:
    assert layout_for(b"EMBERUPD\x01\x00\x01", layouts) is layouts[0]


def test_metrics_of_another_tier_are_not_sent(
    tiers_plan: SignedPlan, layouts: tuple[Layout, ...], update: Update
) -> None:
    values = Update(np.zeros(layouts[1].count, np.float32), 1, update.metrics)
    with pytest.raises(UpdateLayoutError, match="expected tier 1, got 0"):
        encode_update(values, signed_plan=tiers_plan, layout=layouts[1])


@pytest.mark.parametrize(
    ("tiers", "message"),
    [
        ((), "tiers must be 1 to 16"),
        ((Tier(0),) * 17, "tiers must be 1 to 16"),
        ((Tier(-1),), "part of the one before"),
        ((Tier(1), Tier(0)), "part of the one before"),
        ((Tier(0, max_rank=1), Tier(1)), "part of the one before"),
        ((Tier(0, max_rank=1025),), "part of the one before"),
        ((Tier(0, max_rank=0),), "max_rank must be 1 to 1024"),
        ((Tier(0, memory_mib=0),), "memory_mib at least 1"),
        ((Tier(0, step_s=0.0),), "step_s must be more than 0"),
    ],
)
def test_a_contradiction_is_named(
    plan: Plan, signing_key: Ed25519PrivateKey, tiers: tuple[Tier, ...], message: str
) -> None:
    hostile = sign_plan(msgspec.structs.replace(plan, tiers=tiers), signing_key)
    with pytest.raises(PlanFormatError, match=message):
        open_plan(hostile.data, signing_key.public_key())


def test_only_a_plan_that_trains_has_tiers(plan: Plan, signing_key: Ed25519PrivateKey) -> None:
    hostile = sign_plan(msgspec.structs.replace(plan, state="finished", tiers=TIERS), signing_key)
    with pytest.raises(PlanFormatError, match="only a plan that trains has tiers"):
        open_plan(hostile.data, signing_key.public_key())


@pytest.mark.parametrize(
    ("memory", "step", "wanted", "tier"),
    [
        (None, None, 0, 0),  # nothing is known
        (2048, 1.5, 0, 0),  # just enough
        (2047, None, 0, 1),
        (None, 1.6, 0, 1),  # slow, and no tier below is for the slow
        (9000, 60.0, 0, 1),
        (511, 0.1, 0, 2),
        (9000, 0.1, 1, 1),  # its user wants less
        (511, 0.1, 1, 2),  # never more than it can carry
        (9000, 0.1, 7, 2),  # never a tier that the plan has not
    ],
)
def test_the_weakest_tier_that_is_meant_is_taken(
    memory: float | None, step: float | None, wanted: int, tier: int
) -> None:
    assert choose_tier(TIERS, memory_mib=memory, step_s=step, wanted=wanted) == tier


def test_a_plan_without_tiers_has_one(plan: Plan) -> None:
    assert choose_tier(plan.tiers or (), memory_mib=1.0, step_s=1e9, wanted=3) == 0
    assert [layout.tier for layout in layouts_of(plan)] == [0]


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 5)), min_size=1, max_size=16))
def test_a_tier_carries_the_first_part_of_each_block_of_the_one_before(bounds: list[tuple[int, int]]) -> None:
    """What the aggregator relies on: the same order, and of every block its first rows or columns."""
    lowest = sorted(bound for bound, _ in bounds)
    ranks = sorted((rank for _, rank in bounds), reverse=True)
    modules = (ModulePlan("layer.0.query", 4, "AB"), ModulePlan("layer.1.query", 6, "B", (0, 2, 5)))
    tiers = tuple(Tier(block, max_rank=rank) for block, rank in zip(lowest, ranks, strict=True))
    plan = Plan(1, "t", 0, 1, "train", "", "", 0, modules, True, None, None, 0, 0.0, tiers=tiers)  # type: ignore[arg-type]
    for before, after in pairwise(layouts_of(plan)):
        known = [name for name, _ in before.blocks]
        assert [name for name, _ in after.blocks] == [name for name in known if name in dict(after.blocks)]
        for name, shape in after.blocks:
            assert all(size <= most for size, most in zip(shape, dict(before.blocks)[name], strict=True))
            mine, theirs = after.components.get(name), before.components.get(name)
            if mine is not None:
                assert mine == (theirs or tuple(range(6)))[: len(mine)]
