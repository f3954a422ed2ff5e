"""Messages are read strictly and secrets do not show."""

from __future__ import annotations

import json

import msgspec
import pytest

from edge_runtime.wire import (
    DeviceStatus,
    Enrolled,
    Enrolment,
    RequestFormatError,
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
DEVICE = DeviceStatus("pi-4", 1.8e9, None, left=False, updates=3, bytes_up=10**9, bytes_down=10**9, train_s=1.5)
ROUND = RoundStatus(0, 4, 400, 0.7, 0.5, 0.91, 100, 10**9, 12.5, "ad" * 32)
STATUS = TaskStatus("sst2", "training", 3, 20, "accuracy", 1, 4, 1.8e9, "ad" * 32, 1, 2, (DEVICE,), (ROUND,))
MESSAGES: list[msgspec.Struct] = [
    Enrolment(SECRET, "pi-4", "0f" * 32),
    Enrolled("pi-4", "sst2", "0f" * 32),
    TokenRequest("pi-4", 3600),
    TokenAnswer("pi-4", str(TOKEN), 1.8e9),
    UpdateReceipt("pi-4", 7, "00" * 32, 300),
    STATUS,
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
    ],
)
def test_field_out_of_form_is_refused(message: msgspec.Struct, field: str, value: object) -> None:
    document = json.loads(encode_message(message)) | {field: value}
    with pytest.raises(RequestFormatError, match=f"not a {type(message).__name__}") as caught:
        decode_message(json.dumps(document).encode(), type(message))
    assert len(str(caught.value)) < 300


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
