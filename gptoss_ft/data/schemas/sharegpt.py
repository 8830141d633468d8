"""ShareGPT rows: `conversations` of `{"from": ..., "value": ...}`, and `system` and `tools` where there are any.

`function_call` holds one call, or a list of calls, as JSON with `name` and `arguments`; `observation` and `tool` hold
its result. A `<think>...</think>` that begins an answer is the reasoning that led to it.
"""

import re
from collections.abc import Mapping
from typing import Any

from gptoss_ft.data.schemas.chat import DEFAULTS, ChatCall, ChatMessage, ChatRole, conversation_of, require_answer
from gptoss_ft.data.schemas.fields import Field, is_json_list
from gptoss_ft.harmony.conversation import Conversation

SPEAKERS: dict[str, ChatRole] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
THINKING = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)


def recognises(row: Mapping[str, Any]) -> str | None:
    """Why the row is of this format; None if it is not."""
    return "it has a list of `conversations`" if isinstance(row.get("conversations"), list) else None


def read_sharegpt_row(row: Mapping[str, Any], *, defaults: Conversation = DEFAULTS) -> Conversation:
    """The conversation of a row.

    Raises:
        UserError: naming the field, if the row is not of this format or has no assistant message.
    """
    fields = Field(row)
    chat = [_message(entry) for entry in fields["conversations"].parsed_list()]
    if system := fields["system"]:
        chat.insert(0, ChatMessage(system, "system", system))
    require_answer(chat, fields["conversations"])
    return conversation_of(chat, fields, tools=fields["tools"], defaults=defaults)


def split_thinking(answer: Field) -> tuple[str, Field]:
    """The reasoning inside a leading `<think>...</think>`, and the answer after it."""
    found = THINKING.match(answer.text())
    return (found[1].strip(), Field(answer.value[found.end() :], answer.path)) if found else ("", answer)


def _message(entry: Field) -> ChatMessage:
    speaker, value = entry["from"].text(), entry["value"]
    if speaker not in SPEAKERS:
        raise entry["from"].error(f"{speaker!r} is no speaker; use one of {', '.join(SPEAKERS)}")
    role = SPEAKERS[speaker]
    if speaker == "function_call":
        calls = value.parsed_list() if is_json_list(value.value) else [value.parsed()]
        calls_read = tuple(ChatCall(call["name"], call["arguments"]) for call in calls)
        return ChatMessage(entry, role, Field(None, value.path), calls=calls_read)
    if role != "assistant":
        return ChatMessage(entry, role, value)
    thinking, answer = split_thinking(value)
    return ChatMessage(entry, role, answer, thinking=thinking)
