"""Reads a chat template as a sequence of wrapped messages, where it is one.

Devices carry no template engine. The pieces are found by rendering conversations of sentinels, and believed only when
longer conversations come out the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from edge_runtime.bundle import Chat, ChatRole

_Message = tuple[str, str]  # role, content
_LONGEST_TURNS = 4


def find_chat(tokenizer: Any, *, begins_with_bos: bool) -> Chat | None:
    """The chat form of a tokenizer's template, or None when it has none or it is not of this form.

    Args:
        tokenizer: A transformers tokenizer.
        begins_with_bos: Whether texts get the begin token as a prefix id anyway; it is then cut from the template's.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    bos = tokenizer.bos_token if begins_with_bos and tokenizer.bos_token else ""

    def render(messages: Sequence[_Message]) -> str:
        turns = [{"role": role, "content": content} for role, content in messages]
        return str(tokenizer.apply_chat_template(turns, tokenize=False)).removeprefix(bos)

    for roles in (("system", "user", "assistant"), ("user", "assistant")):
        try:
            chat = _derive(render, with_system="system" in roles)
            if chat is not None and all(render(talk) == _apply(chat, talk) for talk in _trials(roles)):
                return chat
        except (TemplateError, ValueError, TypeError, KeyError):  # templates refuse roles in their own ways
            continue
    return None


def _derive(render: Any, *, with_system: bool) -> Chat | None:
    turns = ["user", "assistant", "user"]
    user_talk = _pieces(render, turns)  # preamble+before, after+before, after+before, after
    closing = _pieces(render, ["user", "assistant"])
    if user_talk is None or closing is None:
        return None
    user_after, assistant_after = user_talk[-1], closing[-1]
    assistant_before = user_talk[1].removeprefix(user_after)
    user_before = user_talk[2].removeprefix(assistant_after)
    roles = {"user": ChatRole(user_before, user_after), "assistant": ChatRole(assistant_before, assistant_after)}
    if with_system:
        pieces = _pieces(render, ["system", "user"])
        if pieces is None:
            return None
        roles["system"] = ChatRole(pieces[0], pieces[1].removesuffix(user_before))
    return Chat(roles=roles, preamble=user_talk[0].removesuffix(user_before))


def _pieces(render: Any, roles: Sequence[str]) -> list[str] | None:
    """The text around the contents of a conversation: one piece more than there are messages."""
    text = render([(role, f"zq{number}qz") for number, role in enumerate(roles)])
    pieces = re.split(r"zq\d+qz", text)
    return pieces if len(pieces) == len(roles) + 1 else None


def _apply(chat: Chat, messages: Sequence[_Message]) -> str:
    text = "" if messages[0][0] == "system" else chat.preamble
    return text + "".join(chat.roles[role].before + content + chat.roles[role].after for role, content in messages)


def _trials(roles: Sequence[str]) -> list[list[_Message]]:
    """Conversations of several lengths, with and without a system message."""
    talks = []
    for turns in range(1, _LONGEST_TURNS + 1):
        talk = [(("user", "assistant")[turn % 2], f"Turn {turn}: words, and more words.") for turn in range(turns)]
        talks.append(talk)
        if "system" in roles:
            talks.append([("system", "Be brief."), *talk])
    return talks
