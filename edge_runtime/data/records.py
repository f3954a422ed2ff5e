"""What one record of local data means: pure functions from named fields to a record or a named defect.

Nothing is repaired: a record has exactly the types and the content its task needs, or it is a bad line.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import msgspec

from edge_runtime.bundle import Task
from edge_runtime.data.errors import RecordDefectError

Purpose = Literal["train", "predict"]  # "train" also stands for evaluation: the answers must be there

ASSISTANT = "assistant"  # the role whose messages are trained
SYSTEM = "system"
SHOWN_CHARS = 60
SHOWN_NAMES = 8


class LabelledText(msgspec.Struct, frozen=True):
    """A text and its class."""

    text: str
    label: str


class PlainText(msgspec.Struct, frozen=True):
    """A text: every token is trained by a language model, none by a classifier."""

    text: str


class PromptCompletion(msgspec.Struct, frozen=True):
    """A prompt, given, and the completion, trained."""

    prompt: str
    completion: str


class Message(msgspec.Struct, frozen=True):
    """One message of a conversation."""

    role: str
    content: str


class Conversation(msgspec.Struct, frozen=True):
    """Messages in order, at least one of them the assistant's."""

    messages: tuple[Message, ...]


Record = LabelledText | PlainText | PromptCompletion | Conversation

# The fields a record is recognised by. The first shape whose fields are all there wins; other fields are ignored.
LM_SHAPES = (("messages",), ("prompt", "completion"), ("text",))
LABELLED_SHAPES = (("text", "label"),)
UNLABELLED_SHAPES = (("text",),)


class Accepted(msgspec.Struct, frozen=True):
    """Which records a bundle can use for a purpose.

    ``roles`` are those of the bundle's chat template, None when it has none; ``labels`` belong to task classify.
    """

    task: Task
    purpose: Purpose
    labels: frozenset[str] = frozenset()
    roles: frozenset[str] | None = None

    @property
    def shapes(self) -> tuple[tuple[str, ...], ...]:
        """The accepted sets of fields, the preferred one first."""
        if self.task == "lm":
            return LM_SHAPES
        return LABELLED_SHAPES if self.purpose == "train" else UNLABELLED_SHAPES


def find_shape(names: Iterable[str], shapes: tuple[tuple[str, ...], ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The shape that fields called ``names`` make, and the names it leaves unused.

    Raises:
        RecordDefectError: no shape has all its fields; the message names those expected and those found.
    """
    found = tuple(names)
    for shape in shapes:
        if set(shape) <= set(found):
            return shape, tuple(name for name in found if name not in shape)
    expected = ", or ".join(" and ".join(shape) for shape in shapes)
    raise RecordDefectError(f"missing field: expected {expected}, got {_listed(found)}")


def parse_record(fields: Mapping[str, object], accepted: Accepted) -> tuple[Record, tuple[str, ...]]:
    """Make a record of one line's fields.

    Returns:
        The record and the names of the fields it ignored; those inside a message are called ``messages.name``.

    Raises:
        RecordDefectError: a field is missing, has a wrong type, holds nothing or a NUL character, or names a label
            or a chat role that the bundle does not know.
    """
    shape, ignored = find_shape(fields, accepted.shapes)
    if shape == ("messages",):
        conversation, more = _conversation(fields["messages"], accepted)
        return conversation, ignored + more
    values = [_text(name, fields[name]) for name in shape]
    if shape == ("prompt", "completion"):
        return PromptCompletion(*values), ignored
    if shape == ("text", "label"):
        return _labelled(values[0], values[1], accepted), ignored
    return PlainText(*values), ignored


def _labelled(text: str, label: str, accepted: Accepted) -> LabelledText:
    if label not in accepted.labels:
        known = f"one of the {len(accepted.labels)} labels the bundle knows"
        raise RecordDefectError(f"unknown label: expected {known}, got {_shown(label)}")
    return LabelledText(text, label)


def _conversation(value: object, accepted: Accepted) -> tuple[Conversation, tuple[str, ...]]:
    if accepted.roles is None:
        raise RecordDefectError("no chat template: expected text, or prompt and completion, got messages")
    if not isinstance(value, list):
        raise RecordDefectError(f"messages has a wrong type: expected an array, got {json_kind(value)}")
    messages = []
    ignored: dict[str, None] = {}
    for index, item in enumerate(value):
        message, more = _message(f"messages[{index}]", item, accepted.roles)
        messages.append(message)
        ignored.update(dict.fromkeys(more))
    if not any(message.role == ASSISTANT for message in messages):
        roles = _listed(message.role for message in messages)
        raise RecordDefectError(f"no answer: expected a message of role {ASSISTANT!r}, got {roles}")
    return Conversation(tuple(messages)), tuple(ignored)


def _message(where: str, item: object, roles: frozenset[str]) -> tuple[Message, tuple[str, ...]]:
    if not isinstance(item, dict):
        raise RecordDefectError(f"{where} has a wrong type: expected an object, got {json_kind(item)}")
    try:
        _, ignored = find_shape(item, (("role", "content"),))
    except RecordDefectError as defect:
        raise RecordDefectError(f"{where}: {defect}") from None  # the same defect, with its place
    role = _text(f"{where}.role", item["role"])
    if role not in roles:
        raise RecordDefectError(f"{where}: unknown role: expected {_listed(sorted(roles))}, got {_shown(role)}")
    content = _text(f"{where}.content", item["content"])
    return Message(role, content), tuple(f"messages.{name}" for name in ignored)


def _text(name: str, value: object) -> str:
    """The value itself, when it is a text that can be trained on."""
    if not isinstance(value, str):
        raise RecordDefectError(f"{name} has a wrong type: expected a string, got {json_kind(value)}")
    if not value.strip():
        got = "only white space" if value else "an empty string"
        raise RecordDefectError(f"{name} is empty: expected some text, got {got}")
    if "\0" in value:
        raise RecordDefectError(f"{name} holds a NUL character: expected text, got U+0000 at {value.index(chr(0))}")
    return value


def json_kind(value: object) -> str:
    """What a decoded value is called in JSON, with its article."""
    if value is None:
        return "null"
    kinds = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "an array"}
    return kinds.get(type(value), "an object")


def _shown(value: str) -> str:
    """A value from the data, quoted, escaped and cut, so that a terminal can show it."""
    return repr(value if len(value) <= SHOWN_CHARS else value[:SHOWN_CHARS] + "…")


def _listed(names: Iterable[str]) -> str:
    """The first names, quoted; ``none`` when there are none."""
    every = list(names)
    shown = ", ".join(_shown(name) for name in every[:SHOWN_NAMES]) or "none"
    return shown if len(every) <= SHOWN_NAMES else f"{shown} and {len(every) - SHOWN_NAMES} more"
