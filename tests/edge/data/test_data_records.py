"""Which fields make a record, and the name of every way in which they do not."""

from __future__ import annotations

import re

import pytest

from edge_runtime.data.errors import RecordDefectError
from edge_runtime.data.records import (
    Accepted,
    Conversation,
    LabelledText,
    Message,
    PlainText,
    PromptCompletion,
    Record,
    parse_record,
)

CLASSIFY = Accepted("classify", "train", frozenset({"joy", "anger"}))
PREDICT = Accepted("classify", "predict", frozenset({"joy", "anger"}))
LM = Accepted("lm", "train")
CHAT = Accepted("lm", "train", roles=frozenset({"user", "assistant"}))

ASK = {"role": "user", "content": "why?"}
ANSWER = {"role": "assistant", "content": "so."}


@pytest.mark.parametrize(
    ("accepted", "fields", "record", "ignored"),
    [
        (CLASSIFY, {"text": "a", "label": "joy"}, LabelledText("a", "joy"), ()),
        (CLASSIFY, {"id": 1, "text": "a", "label": "joy", "x": None}, LabelledText("a", "joy"), ("id", "x")),
        (PREDICT, {"text": "a"}, PlainText("a"), ()),
        (PREDICT, {"text": "a", "label": 3}, PlainText("a"), ("label",)),
        (LM, {"text": " a\n"}, PlainText(" a\n"), ()),
        (LM, {"prompt": "a", "completion": "b"}, PromptCompletion("a", "b"), ()),
        (LM, {"text": 0, "completion": "b", "prompt": "a"}, PromptCompletion("a", "b"), ("text",)),
        (LM, {"text": "a", "prompt": "b"}, PlainText("a"), ("prompt",)),
        (
            CHAT,
            {"prompt": 0, "completion": 0, "messages": [ASK | {"name": "x"}, ANSWER | {"name": "y"}]},
            Conversation((Message("user", "why?"), Message("assistant", "so."))),
            ("prompt", "completion", "messages.name"),
        ),
    ],
)
def test_the_first_complete_shape_is_the_record_and_other_fields_are_ignored(
    accepted: Accepted, fields: dict[str, object], record: Record, ignored: tuple[str, ...]
) -> None:
    assert parse_record(fields, accepted) == (record, ignored)


@pytest.mark.parametrize(
    ("accepted", "fields", "message"),
    [
        (CLASSIFY, {"text": "a"}, "missing field: expected text and label, got 'text'"),
        (CLASSIFY, {"prompt": "a", "completion": "b"}, "expected text and label, got 'prompt', 'completion'"),
        (CLASSIFY, {}, "missing field: expected text and label, got none"),
        (PREDICT, {"label": "joy"}, "missing field: expected text, got 'label'"),
        (LM, {"prompt": "a"}, "expected messages, or prompt and completion, or text, got 'prompt'"),
        (LM, {str(i): 0 for i in range(12)}, "got '0', '1', '2', '3', '4', '5', '6', '7' and 4 more"),
        (
            CLASSIFY,
            {"text": "a", "label": "sad"},
            "unknown label: expected one of the 2 labels the bundle knows, got 'sad'",
        ),
        (CLASSIFY, {"text": "a", "label": "x" * 99 + "\n"}, f"got '{'x' * 60}…'"),
        (CLASSIFY, {"text": "a", "label": 1}, "label has a wrong type: expected a string, got a number"),
        (CLASSIFY, {"text": "a", "label": True}, "label has a wrong type: expected a string, got a boolean"),
        (CLASSIFY, {"text": None, "label": "joy"}, "text has a wrong type: expected a string, got null"),
        (LM, {"text": ["a"]}, "text has a wrong type: expected a string, got an array"),
        (LM, {"text": {}}, "text has a wrong type: expected a string, got an object"),
        (LM, {"text": ""}, "text is empty: expected some text, got an empty string"),
        (LM, {"text": " \n"}, "text is empty: expected some text, got only white space"),
        (LM, {"prompt": "a", "completion": ""}, "completion is empty"),
        (LM, {"prompt": "", "completion": "b"}, "prompt is empty"),
        (LM, {"text": "ab\0c"}, "text holds a NUL character: expected text, got U+0000 at 2"),
        (LM, {"messages": [ASK, ANSWER]}, "no chat template: expected text, or prompt and completion, got messages"),
        (CHAT, {"messages": "hi"}, "messages has a wrong type: expected an array, got a string"),
        (CHAT, {"messages": []}, "no answer: expected a message of role 'assistant', got none"),
        (CHAT, {"messages": [ASK]}, "no answer: expected a message of role 'assistant', got 'user'"),
        (CHAT, {"messages": [ASK, "so."]}, "messages[1] has a wrong type: expected an object, got a string"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages[0]: missing field: expected role and content, got 'role'"),
        (CHAT, {"messages": [ASK | {"role": 1}]}, "messages[0].role has a wrong type: expected a string, got a number"),
        (
            CHAT,
            {"messages": [ASK | {"role": "tool"}]},
            "messages[0]: unknown role: expected 'assistant', 'user', got 'tool'",
        ),
        (CHAT, {"messages": [ASK, ANSWER | {"content": ""}]}, "messages[1].content is empty"),
        (CHAT, {"messages": [ANSWER | {"content": [ASK]}]}, "messages[0].content has a wrong type: expected a string"),
    ],
)
def test_every_defect_is_named(accepted: Accepted, fields: dict[str, object], message: str) -> None:
    with pytest.raises(RecordDefectError, match=re.escape(message)):
        parse_record(fields, accepted)
