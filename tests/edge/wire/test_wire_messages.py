"""Messages are read strictly and secrets do not show."""

from __future__ import annotations

import json

import msgspec
import pytest

from edge_runtime.wire import (
    Capability,
    DeviceStatus,
    Enrolled,
    Enrolment,
    KeyStatement,
    PlanKeyRotation,
    RequestFormatError,
    Revocation,
    Revoked,
    RoundStatus,
    TaskStatus,
    Token,
    TokenAnswer,
    TokenRequest,
    UpdateReceipt,
    decode_message,
    encode_message,
)
from edge_runtime.wire.messages import MAX_MESSAGE_BYTES, MAX_STATUS_BYTES

SECRET = bytes(range(16)).hex()
TOKEN = Token(SECRET, "ab" * 32)
CAPABILITY = Capability("aarch64", 4, 3906, 3100, 0.25, 1.5, 250_000.0, 1_000_000.0, 0.03)
DEVICE = DeviceStatus(
    "pi-4",
    1.8e9,
    None,
    left=False,
    updates=3,
    bytes_up=10**9,
    bytes_down=10**9,
    train_s=1.5,
    capability=CAPABILITY,
    capability_told=1.8e9,
)
ROUND = RoundStatus(0, 4, 400, 0.7, 0.5, 0.91, 100, 10**9, 12.5, "ad" * 32)
STATUS = TaskStatus("sst2", "training", 3, 20, "accuracy", 1, 4, 1.8e9, "ad" * 32, 1, 2, (DEVICE,), (ROUND,))
MESSAGES: list[msgspec.Struct] = [
    Enrolment(SECRET, "pi-4", "0f" * 32),
    Enrolled("pi-4", "sst2", "0f" * 32),
    TokenRequest("pi-4", 3600),
    TokenAnswer("pi-4", str(TOKEN), 1.8e9),
    Revocation("pi-4"),
    Revoked("pi-4", 1.8e9, True, 3, 4),
    PlanKeyRotation("0f" * 32, "f0" * 32, 5, False),
    KeyStatement("sst2", "0f" * 32, "f0" * 32, "ab" * 64),
    UpdateReceipt("pi-4", 7, "00" * 32, 300),
    STATUS,
    CAPABILITY,
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_round_trip(message: msgspec.Struct) -> None:
    assert decode_message(encode_message(message), type(message)) == message


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_unknown_or_missing_field_is_refused(message: msgspec.Struct) -> None:
    document = json.loads(encode_message(message))
    first = next(iter(document))
    for wrong in (document | {"surprise": 1}, {key: value for key, value in document.items() if key != first}):
        with pytest.raises(RequestFormatError, match=f"not a {type(message).__name__}"):
            decode_message(json.dumps(wrong).encode(), type(message))


@pytest.mark.parametrize(
    ("message", "field", "value"),
    [
        (MESSAGES[0], "token", SECRET[:-1]),
        (MESSAGES[0], "token", SECRET + "\n"),
        (MESSAGES[0], "device", "Pi"),
        (MESSAGES[0], "device", "pi-4\n"),
        (MESSAGES[0], "signing_key", "0F" * 32),
        (MESSAGES[0], "signing_key", 5),
        (MESSAGES[1], "task", "../task"),
        (MESSAGES[1], "plan_key", ""),
        (MESSAGES[2], "device", ""),
        (MESSAGES[2], "ttl_s", 0),
        (MESSAGES[2], "ttl_s", 10**400),
        (MESSAGES[2], "ttl_s", 1.5),
        (MESSAGES[2], "ttl_s", True),
        *((CAPABILITY, "machine", value) for value in ("", "Intel(R) Xeon(R)", "x" * 33, "a\n")),
        *((CAPABILITY, "cores", value) for value in (0, 65_537, 1.5)),
        *((CAPABILITY, name, value) for name in ("memory_mb", "available_mb") for value in (-1, 2**30 + 1, 0.5, "1")),
        *(
            (CAPABILITY, name, value)
            for name in ("calibration_s", "step_s", "round_trip_s")
            for value in (0, -1, 604_801, None, "1")
        ),
        *((CAPABILITY, name, value) for name in ("up_bytes_s", "down_bytes_s") for value in (0, -1, 2e12, None)),
    ],
)
def test_field_out_of_form_is_refused(message: msgspec.Struct, field: str, value: object) -> None:
    document = json.loads(encode_message(message)) | {field: value}
    with pytest.raises(RequestFormatError, match=f"not a {type(message).__name__}") as caught:
        decode_message(json.dumps(document).encode(), type(message))
    assert len(str(caught.value)) < 300


def test_figures_that_are_not_measured_are_left_out() -> None:
    bare = Capability("x86_64", 1, 512, 0)
    assert encode_message(bare) == b'{"machine":"x86_64","cores":1,"memory_mb":512,"available_mb":0}'
    assert decode_message(encode_message(bare), Capability) == bare


def test_more_memory_free_than_there_is_is_refused() -> None:
    wrong = encode_message(CAPABILITY).replace(b'"available_mb":3100', b'"available_mb":3907')
    with pytest.raises(RequestFormatError, match=r"available_mb \(3907\) must not exceed memory_mb \(3906\)"):
        decode_message(wrong, Capability)


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"1e999"])
def test_a_figure_that_is_not_finite_is_refused(number: bytes) -> None:
    wrong = encode_message(CAPABILITY).replace(b'"step_s":1.5', b'"step_s":' + number)
    with pytest.raises(RequestFormatError, match="not a Capability"):
        decode_message(wrong, Capability)


@pytest.mark.parametrize("data", [b"", b"null", b"[", b'{"device":"\xff"}', b"[" * 50_000, b'{"a":' * 10_000, b"\0"])
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(RequestFormatError):
        decode_message(data, TokenRequest)


def test_length_is_limited() -> None:
    message = encode_message(TokenRequest("pi-4", 1))
    assert decode_message(message.ljust(MAX_MESSAGE_BYTES), TokenRequest)
    with pytest.raises(RequestFormatError, match=f"expected at most {MAX_MESSAGE_BYTES} bytes"):
        decode_message(message.ljust(MAX_MESSAGE_BYTES + 1), TokenRequest)


def test_status_of_a_large_task_can_be_read() -> None:
    """A thousand devices and as many rounds are more than a message may be."""
    status = msgspec.structs.replace(STATUS, devices=(DEVICE,) * 1024, history=(ROUND,) * 1000)
    data = encode_message(status)
    assert MAX_MESSAGE_BYTES < len(data) < MAX_STATUS_BYTES
    assert decode_message(data, TaskStatus) == status


def test_secrets_are_masked() -> None:
    for holder in (TOKEN, MESSAGES[0], MESSAGES[3]):
        for text in (repr(holder), f"{[holder]}"):
            assert SECRET not in text
            assert str(TOKEN) not in text
            assert "…" in text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ember1.",
        str(TOKEN)[:-1],
        str(TOKEN) + "A",
        str(TOKEN) + "=",
        str(TOKEN).replace("ember1", "ember2"),
        str(TOKEN).replace("ember1.", ""),
        str(TOKEN).replace("ember1.", "Ember1."),
        str(TOKEN)[:20] + "!!!!" + str(TOKEN)[20:],  # a lenient base64 would skip these
        str(TOKEN)[:20] + "\n" + str(TOKEN)[20:],
        str(TOKEN)[:-1] + "+",
        str(TOKEN)[:-1] + "ß",
        str(TOKEN)[:-1] + "\udc80",
        "x" * 10**6,
    ],
    ids=lambda text: repr(text[:12]),
)
def test_malformed_token(text: str) -> None:
    with pytest.raises(RequestFormatError, match="not an EmberLoRA token") as caught:
        Token.parse(text)
    assert len(str(caught.value)) < 200, "a token does not belong into a message"
