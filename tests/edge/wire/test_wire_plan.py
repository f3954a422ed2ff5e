"""A plan is obeyed only when its signature, schema, fields and order are right; each refusal has its name."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_runtime.wire import (
    ModulePlan,
    Plan,
    PlanFormatError,
    PlanOrderError,
    PlanSignatureError,
    Quantisation,
    SignedPlan,
    UpdateRules,
    check_order,
    open_plan,
    sign_plan,
)
from edge_runtime.wire.plan import MAX_PLAN_BYTES

Open = Callable[[bytes], SignedPlan]


@pytest.fixture
def open_text(signing_key: Ed25519PrivateKey) -> Open:
    """Opens a plan whose text is anything, rightly signed: what a wrong aggregator might send."""
    return lambda text: open_plan(signing_key.sign(b"emberlora plan 1\0" + text) + text, signing_key.public_key())


def changed(signed: SignedPlan, path: str, value: object) -> bytes:
    """The plan's text with the member at ``path`` (dots between keys) replaced."""
    document: dict[str, Any] = json.loads(signed.data[64:])
    *parents, last = path.split(".")
    member: Any = document
    for parent in parents:
        member = member[parent]
    member[last] = value
    return json.dumps(document).encode()


MODULE = {"name": "a", "rank": 1, "alive": "AB"}
WIDE = {"name": "b", "rank": 4, "alive": "B"}
CONTRADICTIONS = [
    ("task", "Sst2", "task must be a name"),
    ("task", "sst2\nx", "task must be a name"),
    ("round", -1, "round must be from 0"),
    ("round", 2**32, "round must be from 0"),
    ("seed", -1, "seed and adapter_bytes"),
    ("adapter_bytes", 10**40, "seed and adapter_bytes"),
    ("min_examples", 0, "min_examples"),
    ("modules", [MODULE, MODULE], "a module stands twice"),
    ("modules", [{**MODULE, "rank": 0}], "ranks must be 1 to 1024"),
    ("modules", [{**MODULE, "rank": 1025}], "ranks must be 1 to 1024"),
    ("modules", [{**MODULE, "trained": [0]}], "trained components"),  # all are never listed
    ("modules", [{**WIDE, "trained": [0, 1, 2, 3]}], "trained components"),
    ("modules", [{**WIDE, "trained": []}], "trained components"),  # none is a dead module
    ("modules", [{**WIDE, "trained": [0], "alive": ""}], "trained components"),
    ("modules", [{**WIDE, "trained": [-1, 2]}], "trained components"),
    ("modules", [{**WIDE, "trained": [1, 4]}], "trained components"),
    ("modules", [{**WIDE, "trained": [2, 1]}], "trained components"),
    ("modules", [{**WIDE, "trained": [1, 1]}], "trained components"),
    ("modules", [MODULE, {**WIDE, "trained": [10**40]}], "trained components"),
    ("training.steps", 5, "exactly one of steps and epochs"),
    ("training.epochs", None, "exactly one of steps and epochs"),
    ("training.epochs", 0, "must be positive"),
    ("training.batch_size", 0, "must be positive"),
    ("training.max_tokens", 0, "must be positive"),
    ("training.lr_a", -1e-9, "learning rates"),
    ("training.mu", -1.0, "learning rates"),
    ("training.beta1", 1.0, "betas"),
    ("training.clip_norm", 0.0, "clip_norm"),
    ("training.local_kill", 0.0, "local_kill"),  # nothing is left out
    ("training.local_kill", -0.1, "local_kill"),
    ("training.local_kill", 1.01, "local_kill"),
    ("training.example_share", 0.0, "example_share"),
    ("training.example_share", 1.0, "example_share"),  # all of them is said by leaving it out
    ("training.example_share", -0.5, "example_share"),
    ("update.fraction_bits", 40, "63 bits"),
    ("update.fraction_bits", 0, "63 bits"),
    ("update.fraction_bits", 10**9, "63 bits"),
    ("update.max_abs", 0.0, "63 bits"),
    ("update.max_abs", 1e308, "63 bits"),
    ("update.max_devices", 0, "63 bits"),
    ("update.weight_cap", 2**20, "63 bits"),
    ("update.max_norm", 0.0, "max_norm must be more than 0"),
    ("update.max_norm", -1.0, "max_norm must be more than 0"),
    ("round_key", "", "round key"),
    ("state", "measure", "a measuring plan trains nothing, quantises nothing and weighs every device 1"),
    ("personal", [], "personal must be head, B"),  # nothing is left out
    ("personal", ["B", "head"], "personal must be head, B"),
    ("personal", ["head", "head"], "personal must be head, B"),
    ("personal", ["head"], "what is personal must not be sent"),  # the plan's head is alive
    ("personal", ["B"], "what is personal must not be sent"),
    ("bundle", "B0" * 32, "digests"),
    ("adapter", "ad", "digests"),
]
WRONG_FIELDS = [
    ("surprise", 1),  # unknown
    ("training.surprise", 1),
    ("update.surprise", 1),
    ("modules", [{**MODULE, "surprise": 1}]),
    ("modules", [{**MODULE, "alive": "BA"}]),
    ("modules", [{**MODULE, "rank": 1.5}]),
    ("modules", [{**WIDE, "trained": None}]),
    ("modules", [{**WIDE, "trained": 2}]),
    ("modules", [{**WIDE, "trained": [1.5]}]),
    ("round", True),
    ("round", "7"),
    ("round", None),
    ("state", "paused"),
    ("head_alive", 1),
    ("training.local_kill", None),
    ("training.example_share", None),
    ("update.max_norm", None),
    ("personal", None),
    ("personal", "head"),
    ("personal", ["A"]),
    ("deadline", "soon"),
]


@pytest.mark.parametrize(("path", "value", "message"), CONTRADICTIONS)
def test_contradiction_is_named(open_text: Open, signed: SignedPlan, path: str, value: object, message: str) -> None:
    with pytest.raises(PlanFormatError, match=rf"contradicts itself: .*{message}"):
        open_text(changed(signed, path, value))


@pytest.mark.parametrize(("path", "value"), WRONG_FIELDS)
def test_wrong_or_unknown_field_is_refused(open_text: Open, signed: SignedPlan, path: str, value: object) -> None:
    with pytest.raises(PlanFormatError, match="not a plan of schema 1"):
        open_text(changed(signed, path, value))


def test_trained_components_are_listed_only_where_not_all_are(open_text: Open, signed: SignedPlan) -> None:
    """A plan that trains whole factors has the bytes it had before there was such a list."""
    modules = (ModulePlan("a", 1, "AB"), ModulePlan("b", 4, "B", (0, 3)))
    text = b'[{"name":"a","rank":1,"alive":"AB"},{"name":"b","rank":4,"alive":"B","trained":[0,3]}]'
    assert msgspec.json.encode(modules) == text
    read = open_text(changed(signed, "modules", json.loads(text))).plan.modules
    assert read == modules
    assert [(module.trained_rank, module.trained_components) for module in read] == [(1, (0,)), (2, (0, 3))]


def test_all_contradictions_are_named_at_once(open_text: Open, signed: SignedPlan) -> None:
    document = json.loads(changed(signed, "round", -1))
    document["bundle"] = ""
    with pytest.raises(PlanFormatError, match=r"round must .*; digests must"):
        open_text(json.dumps(document).encode())


def test_finished_plan_needs_no_round_key(plan: Plan, signing_key: Ed25519PrivateKey) -> None:
    finished = msgspec.structs.replace(plan, state="finished", round_key="")
    assert open_plan(sign_plan(finished, signing_key).data, signing_key.public_key()).plan == finished


def test_measuring_plan_trains_nothing_and_is_answered(plan: Plan, signing_key: Ed25519PrivateKey) -> None:
    """Each of its conditions alone is enough to refuse it; it needs a round key as a training plan does."""
    dead = tuple(msgspec.structs.replace(module, alive="") for module in plan.modules)
    rules = UpdateRules(fraction_bits=24, max_abs=2.0**24, weight_cap=1, max_devices=2**14)
    good = msgspec.structs.replace(plan, state="measure", modules=dead, head_alive=False, update=rules)
    assert open_plan(sign_plan(good, signing_key).data, signing_key.public_key()).plan == good
    heavy = msgspec.structs.replace(rules, weight_cap=2, max_devices=4)
    codes = {"quantisation": Quantisation(8, (1.0, 1.0, 1.0))}
    trains = ({"modules": plan.modules}, {"head_alive": True}, {"personal": ("head",)})
    for change in (*trains, {"update": heavy}, {"round_key": ""}, codes):
        bad = msgspec.structs.replace(good, **change)
        with pytest.raises(PlanFormatError, match="round key" if "round_key" in change else "a measuring plan trains"):
            open_plan(sign_plan(bad, signing_key).data, signing_key.public_key())
    bounded = msgspec.structs.replace(good, update=msgspec.structs.replace(rules, max_norm=1.0))
    with pytest.raises(PlanFormatError, match=r"max_norm must be .* for changes, not for what is measured"):
        open_plan(sign_plan(bounded, signing_key).data, signing_key.public_key())


@pytest.mark.parametrize(("schema", "who"), [(2, "device"), (0, "aggregator"), ("1", "device"), (None, "device")])
def test_other_schema_says_who_upgrades(open_text: Open, signed: SignedPlan, schema: object, who: str) -> None:
    """Whatever else a plan of another schema holds."""
    document = json.loads(changed(signed, "schema", schema)) | {"fields of tomorrow": [1]}
    with pytest.raises(PlanFormatError, match=f"expected 1, got {schema!r}: upgrade the {who}"):
        open_text(json.dumps(document).encode())


@pytest.mark.parametrize(
    "text",
    [
        b" ",
        b"[]",
        b"null",
        b"{",
        b'{"schema":1}',
        b'{"schema":1,"task":"\xff"}',
        b'{"schema":1,"task":"\\ud800"}',
        b'{"schema":NaN}',
        b'{"schema":1,"rounds":' + b"9" * 5000 + b"}",
        b'{"schema":1,"deadline":1e999}',
        b'{"schema":1,"modules":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        b"[" * 500_000,
        b'{"a":' * 100_000,
    ],
    ids=lambda text: repr(text[:40]),
)
def test_hostile_text_is_a_format_error(open_text: Open, text: bytes) -> None:
    with pytest.raises(PlanFormatError) as caught:
        open_text(text)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("length", [0, 1, 63, 64, MAX_PLAN_BYTES + 1])
def test_length_is_checked_before_the_signature(signing_key: Ed25519PrivateKey, length: int) -> None:
    with pytest.raises(PlanFormatError, match=f"expected 65 to {MAX_PLAN_BYTES} bytes, got {length}"):
        open_plan(bytes(length), signing_key.public_key())


def test_signature_is_checked_before_the_text_is_read(signed: SignedPlan, signing_key: Ed25519PrivateKey) -> None:
    public = signing_key.public_key()
    other = Ed25519PrivateKey.from_private_bytes(bytes(32))
    text = signed.data[64:]
    forgeries = [
        (signed.data, other.public_key()),  # another key
        (signed.data[:-1], public),  # truncated
        (signed.data + b" ", public),  # lengthened
        (signing_key.sign(text) + text, public),  # signed without the context
        (bytes(64) + b"[" * 500_000, public),
    ]
    for data, key in forgeries:
        with pytest.raises(PlanSignatureError):
            open_plan(data, key)


def test_every_changed_byte_is_noticed(signed: SignedPlan, signing_key: Ed25519PrivateKey) -> None:
    for position in range(0, len(signed.data), 7):
        data = bytearray(signed.data)
        data[position] ^= 1
        with pytest.raises(PlanSignatureError):
            open_plan(bytes(data), signing_key.public_key())


def test_order(plan: Plan) -> None:
    check_order(plan, task="sst2", last_round=-1)
    check_order(plan, task="sst2", last_round=7)  # the same again
    with pytest.raises(PlanOrderError, match="expected round 8 or later, got 7"):
        check_order(plan, task="sst2", last_round=8)
    with pytest.raises(PlanOrderError, match="expected 'mnli', got 'sst2'"):
        check_order(plan, task="mnli", last_round=-1)


@pytest.mark.parametrize("filler", [b"[]", b"{}", b"0", b'""'])
def test_memory_is_bounded(open_text: Open, filler: bytes) -> None:
    """A megabyte of small values under an unknown key costs no multiple of itself."""
    count = (MAX_PLAN_BYTES - 200) // (len(filler) + 1)
    text = b'{"schema":1,"x":[' + b",".join([filler] * count) + b"]}"
    tracemalloc.start()
    try:
        with pytest.raises(PlanFormatError):
            open_text(text)
        assert tracemalloc.get_traced_memory()[1] < 8 * MAX_PLAN_BYTES
    finally:
        tracemalloc.stop()
