"""The bytes of every format. Changing one of these literals is changing the format: ``docs/wire.md``, Versions."""

from __future__ import annotations

import base64
import dataclasses
import hashlib

import msgspec
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from edge_runtime.wire import (
    Capability,
    EnvelopeContext,
    Layout,
    Plan,
    PlanStaleError,
    RoundClosedError,
    SignedPlan,
    SignedRequest,
    Token,
    Update,
    UpdateRules,
    authorization,
    check_answer,
    decode_message,
    decode_update,
    encode_message,
    encode_problem,
    encode_update,
    open_plan,
    parse_authorization,
    seal,
    sign_answer,
    sign_plan,
    unseal,
)

PUBLIC_KEY = "03a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8"  # of the private key 00 01 … 1f

PLAN = bytes.fromhex(
    # Ed25519 signature of b"emberlora plan 1\0" and the text
    "5ae47dfe09593955495dc226582ebfa06c32ac6a69433fe1ba8e123c1d3640d4"
    "2c572fe4698547ac1fd03e1a068b94e5e88bafb3bca111725f07bb1ec4030a00"
) + (
    b'{"schema":1,"task":"sst2","round":7,"rounds":20,"state":"train",'
    b'"bundle":"b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0",'
    b'"adapter":"adadadadadadadadadadadadadadadadadadadadadadadadadadadadadadadad","adapter_bytes":1234,'
    b'"modules":[{"name":"layer.0.query","rank":2,"alive":"AB"},{"name":"layer.1.query","rank":1,"alive":"B"}],'
    b'"head_alive":true,'
    b'"training":{"batch_size":8,"max_tokens":128,"lr_a":0.0002,"lr_b":0.001,"lr_head":0.001,"steps":null,"epochs":1,'
    b'"weight_decay":0.0,"beta1":0.9,"beta2":0.999,"eps":1e-8,"mu":0.0,"clip_norm":null},'
    b'"update":{"fraction_bits":32,"max_abs":8.0,"weight_cap":65536,"max_devices":1024},'
    b'"seed":42,"deadline":1800000000.0,'
    b'"round_key":"358072d6365880d1aeea329adf9121383851ed21a28e3b75e965d0d2cd166254","min_examples":1,"tier":0}'
)
PLAN_DIGEST = "5f1e885de64fb7a03fb8b4bcd7eedd24d90a1be968db80f7b57f774d35ca89c4"

PLAN_ANSWER_HEADER = "McsYGBeq7Py1lgOr6q3XhJNtLT5wK6hgpDOlJaA2VJZMPxBNOwlhICpTz+CBzPR/JA3WAdCYAASJp69tw1dKDw=="

# The same plan where devices keep the head and B: the end of its text, and its digest.
PERSONAL_END = b'"min_examples":1,"tier":0,"personal":["head","B"]}'
PERSONAL_DIGEST = "ed7a6ee742c3e6c00eb283bcee238eab70e8869470eec80a7e5cf94986c9f99c"

LOCAL_KILL_DIGEST = (
    "5c1dc426398600330a045a08c8f89c1753ccdabe6665f49df895a77fbd7ccd39"  # of the plan with local_kill 0.25
)

FRAME = bytes.fromhex(
    "454d424552555044"  # 0: "EMBERUPD"
    "0100"  # 8: version 1
    "0000"  # 10: reserved
    "07000000"  # 12: round 7
    "5f1e885de64fb7a03fb8b4bcd7eedd24d90a1be968db80f7b57f774d35ca89c4"  # 16: plan digest
    "00b0c1f1d6e9db6be55f403e7d8c65590f94d84074b91a16c4ee11a82ab97f52"  # 48: layout digest
    "0e00000000000000"  # 80: 14 values
    "000080bf000040bf000000bf000080be000000000000803e"  # 88: layer.0.query.lora_a (2, 3): -1, -0.75 … 0.25
    "0000003f0000403f0000803f0000a03f"  # layer.0.query.lora_b (2, 2): 0.5 … 1.25
    "0000c03f0000e03f"  # layer.1.query.lora_b (2, 1): 1.5, 1.75
    "0000004000001040"  # classifier.bias (2,): 2, 2.25
    "2c01000000000000"  # 88 + 4·14: weight 300
    "26000000"  # 38 steps
    "64000000"  # 100 examples
    "3d000000"  # 61 correct
    "000000000000e63f"  # loss at start 0.6875
    "000000000000e03f"  # loss at end 0.5
    "000000000000e43f"  # evaluation loss 0.625
    "0000000000002940"  # 12.5 seconds
    "0000c07f"  # peak private memory: NaN, not measured
    "00002044"  # peak total memory 640 MB
)
LAYOUT_TEXT = b"layer.0.query.lora_a 2x3\nlayer.0.query.lora_b 2x2\nlayer.1.query.lora_b 2x1\nclassifier.bias 2\n"

INFO = b"emberlora update 1\nsst2\n7\n5f1e885de64fb7a03fb8b4bcd7eedd24d90a1be968db80f7b57f774d35ca89c4\npi-4\n"
SEALED = bytes.fromhex(  # made once: sealing is randomised
    "06b7324d31c6cc37660751808333b4c34b569ea7f918e747512b093c0be9e73c"  # encapsulated key
    "22ef5f2adf9c12c7"  # ciphertext of "EMBERUPD"
    "637a7352ed556eee09c0125ed525d67b"  # tag
)

REQUEST_TEXT = (
    b"emberlora request 1\npi-4\nPUT\n/v1/tasks/sst2/rounds/7/updates/pi-4\n"
    b"2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881\n1800000000\n000102030405060708090a0b0c0d0e0f\n"
)
AUTHORIZATION = (
    'EmberLoRA device="pi-4", time="1800000000", nonce="000102030405060708090a0b0c0d0e0f", '
    'body="2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881", '
    'signature="Pv8oxqu6ZT38j/r5jXfi2mhqVU+QrcHD4D7jU6N+EWdymz6DIUtSFM/k6otz3+KiAejqCLZ8sCXHrIffnaznDQ=="'
)

TOKEN = "ember1.AAECAwQFBgcICQoLDA0OD1ZHWqdUY0dMAoXfXb8ryrc9plE1iDnpt3SBsuqxB3CM"  # 00 … 0f, SHA-256 of PUBLIC_KEY

CAPABILITY = (
    b'{"machine":"aarch64","cores":4,"memory_mb":3906,"available_mb":3100,"calibration_s":0.25,"step_s":1.5,'
    b'"up_bytes_s":250000.0,"down_bytes_s":1000000.0,"round_trip_s":0.03}'
)

PROBLEM = (
    b'{"type":"urn:emberlora:problem:round-closed","title":"This round takes no more updates","status":409,'
    b'"detail":"round 7: closed","retry_after_s":0.0}'
)


def test_plan_bytes(plan: Plan, signed: SignedPlan, signing_key: Ed25519PrivateKey) -> None:
    assert signing_key.public_key().public_bytes_raw().hex() == PUBLIC_KEY
    assert signed.data == PLAN
    assert signed.digest == PLAN_DIGEST
    assert open_plan(PLAN, signing_key.public_key()) == SignedPlan(PLAN, plan, PLAN_DIGEST)


def test_personal_plan_bytes(plan: Plan, signing_key: Ed25519PrivateKey) -> None:
    """What is personal stands at the end, and nowhere in a plan without it."""
    modules = tuple(msgspec.structs.replace(module, alive="A") for module in plan.modules)
    personal = msgspec.structs.replace(plan, modules=modules, head_alive=False, personal=("head", "B"))
    signed = sign_plan(personal, signing_key)
    text = PLAN[64:].replace(b'"AB"', b'"A"').replace(b'"alive":"B"', b'"alive":"A"')
    text = text.replace(b'"head_alive":true', b'"head_alive":false')
    assert signed.data[64:] == text.replace(b'"min_examples":1,"tier":0}', PERSONAL_END)
    assert signed.digest == PERSONAL_DIGEST
    assert open_plan(signed.data, signing_key.public_key()).plan == personal
    assert b"personal" not in PLAN


def test_local_kill_plan_bytes(plan: Plan, signing_key: Ed25519PrivateKey) -> None:
    """It stands at the end of the training, and nowhere in a plan without it."""
    training = msgspec.structs.replace(plan.training, local_kill=0.25)
    signed = sign_plan(msgspec.structs.replace(plan, training=training), signing_key)
    assert signed.data[64:] == PLAN[64:].replace(b'"clip_norm":null}', b'"clip_norm":null,"local_kill":0.25}')
    assert signed.digest == LOCAL_KILL_DIGEST
    assert b"local_kill" not in PLAN


def test_example_share_plan_bytes(plan: Plan, signing_key: Ed25519PrivateKey) -> None:
    """The same of a share of the examples."""
    training = msgspec.structs.replace(plan.training, example_share=0.5)
    signed = sign_plan(msgspec.structs.replace(plan, training=training), signing_key)
    assert signed.data[64:] == PLAN[64:].replace(b'"clip_norm":null}', b'"clip_norm":null,"example_share":0.5}')
    assert open_plan(signed.data, signing_key.public_key()).plan.training == training
    assert b"example_share" not in PLAN


def test_bounded_plan_bytes(plan: Plan, signing_key: Ed25519PrivateKey) -> None:
    """A plan that bounds no norm is what it was before there was such a field."""
    signed = sign_plan(msgspec.structs.replace(plan, update=UpdateRules(max_norm=1.5)), signing_key)
    assert signed.data[64:] == PLAN[64:].replace(b'"max_devices":1024}', b'"max_devices":1024,"max_norm":1.5}')
    assert b"max_norm" not in PLAN


def test_update_bytes(signed: SignedPlan, layout: Layout, update: Update) -> None:
    assert hashlib.sha256(LAYOUT_TEXT).digest() == layout.digest()
    assert layout.frame_bytes == len(FRAME) == 148 + 4 * 14
    assert encode_update(update, signed_plan=signed, layout=layout) == FRAME
    decoded = decode_update(FRAME, signed_plan=signed, layout=layout)
    assert (decoded.weight, decoded.metrics) == (300, update.metrics)
    np.testing.assert_array_equal(decoded.values, update.values)


def test_envelope_bytes(context: EnvelopeContext, round_key: X25519PrivateKey) -> None:
    assert context.info() == INFO
    assert unseal(SEALED, round_key=round_key, context=context) == b"EMBERUPD"
    fresh = seal(b"EMBERUPD", round_key=round_key.public_key().public_bytes_raw().hex(), context=context)
    assert fresh != SEALED
    assert len(fresh) == len(SEALED)


def test_request_bytes(request_: SignedRequest, signing_key: Ed25519PrivateKey) -> None:
    assert request_.text() == REQUEST_TEXT
    assert authorization(request_, signing_key) == AUTHORIZATION
    parsed, signature = parse_authorization(AUTHORIZATION, method=request_.method, target=request_.target)
    assert parsed == request_
    signing_key.public_key().verify(signature, REQUEST_TEXT)


def test_plan_answer_bytes(request_: SignedRequest, signing_key: Ed25519PrivateKey) -> None:
    text = f"emberlora plan answer 1\n{request_.device}\n{request_.target}\n{request_.nonce}\n{PLAN_DIGEST}\n".encode()
    header = sign_answer(PLAN_DIGEST, request_, signing_key)
    assert header == PLAN_ANSWER_HEADER
    signing_key.public_key().verify(base64.b64decode(header), text)
    check_answer(header, digest=PLAN_DIGEST, request=request_, key=signing_key.public_key())


@pytest.mark.parametrize(
    "changes", [{"device": "pi-2"}, {"target": "/v1/tasks/sst2/plan?after=6&wait=30"}, {"nonce": "00" * 16}, {}]
)
def test_an_answer_is_for_one_request(
    request_: SignedRequest, signing_key: Ed25519PrivateKey, changes: dict[str, str]
) -> None:
    """Of another device, target or nonce, or with another plan, it is refused."""
    header = sign_answer(PLAN_DIGEST, request_, signing_key)
    other = dataclasses.replace(request_, **changes)
    digest = PLAN_DIGEST if changes else PERSONAL_DIGEST
    with pytest.raises(PlanStaleError, match="not made for this request"):
        check_answer(header, digest=digest, request=other, key=signing_key.public_key())


@pytest.mark.parametrize("header", ["", "!", "AAAA", "\u00e9" * 88])
def test_what_is_no_answer_is_refused(request_: SignedRequest, signing_key: Ed25519PrivateKey, header: str) -> None:
    with pytest.raises(PlanStaleError):
        check_answer(header, digest=PLAN_DIGEST, request=request_, key=signing_key.public_key())


def test_token_text() -> None:
    token = Token(bytes(range(16)).hex(), hashlib.sha256(bytes.fromhex(PUBLIC_KEY)).hexdigest())
    assert str(token) == TOKEN
    assert Token.parse(f" {TOKEN}\n") == token


def test_capability_bytes() -> None:
    capability = Capability("aarch64", 4, 3906, 3100, 0.25, 1.5, 250_000.0, 1_000_000.0, 0.03)
    assert encode_message(capability) == CAPABILITY
    assert decode_message(CAPABILITY, Capability) == capability


def test_problem_bytes() -> None:
    assert encode_problem(RoundClosedError("round 7: closed")) == PROBLEM
