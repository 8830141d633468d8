"""Items of OpenAI's Responses API: `input` and `output` of a logged response, or one list of `items`.

Of `input` and `output` only the output has loss; of `items`, everything that the assistant wrote. `phase` says which
channel an assistant's message is on; without it, text right before a call is its preamble and other text is final.
Reasoning is trained where its text is there: encrypted reasoning and summaries are not what the model wrote, so they
are left out.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from gptoss_ft.data.schemas.chat import DEFAULTS, ChatCall, ChatMessage, ChatRole, conversation_of, require_answer
from gptoss_ft.data.schemas.fields import Field
from gptoss_ft.harmony.conversation import Channel, Conversation

LISTS = ("input", "output", "items")
ITEM_TYPES = ("message", "reasoning", "function_call", "function_call_output")
PHASES: dict[str, Channel] = {"commentary": "commentary", "final_answer": "final"}
ROLES: dict[str, ChatRole] = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "assistant": "assistant",
}
ASTRAY = "reasoning that led to no message or call; remove that reasoning"


def recognises(row: Mapping[str, Any]) -> str | None:
    """Why the row is of this format; None if it is not."""
    for name in LISTS:
        items = row.get(name)
        for item in items if isinstance(items, list) else []:
            if isinstance(item, Mapping) and item.get("type") in ITEM_TYPES:
                return f"`{name}` holds an item of type {item['type']!r}"
    return None


def read_responses_row(row: Mapping[str, Any], *, defaults: Conversation = DEFAULTS) -> Conversation:
    """The conversation of a row.

    Raises:
        UserError: naming the field, if an item cannot be used or the assistant says nothing.
    """
    fields = Field(row)
    instructions = fields["instructions"]
    chat = [ChatMessage(instructions, "developer", instructions)] if instructions else []
    if isinstance(fields["input"].value, str):
        chat.append(ChatMessage(fields["input"], "user", fields["input"]))
    elif fields["input"]:
        chat += _messages(fields["input"].parsed_list(), weight=0.0)
    output = fields["items"] or fields["output"]
    chat += _messages(output.parsed_list(), weight=1.0)
    require_answer(chat, output)
    return conversation_of(chat, _settings(fields), tools=fields["tools"], defaults=defaults)


def _settings(fields: Field) -> Field:
    """The row with its `reasoning.effort` and `text.format` where other formats have them."""
    stated = dict(fields.object())
    if isinstance(fields["reasoning"].value, Mapping) and (effort := fields["reasoning"]["effort"]):
        stated["reasoning_effort"] = effort.value
    if isinstance(fields["text"].value, Mapping) and (shape := fields["text"]["format"]):
        flat = shape.object()
        stated["response_format"] = {"type": flat.get("type"), "json_schema": flat}
    return Field(stated)


@dataclass
class _Turn:
    """What the assistant has written since it was last read from: becomes one chat message."""

    thinking: list[str] = field(default_factory=list)
    message: ChatMessage | None = None
    calls: list[ChatCall] = field(default_factory=list)


def _messages(items: list[Field], *, weight: float) -> Iterator[ChatMessage]:
    turn = _Turn()
    for item in items:
        kind = item["type"].value or "message"
        if kind not in ITEM_TYPES:
            raise item["type"].error(
                f"{kind!r} items cannot be used; use {', '.join(ITEM_TYPES)}, or describe the tool as a function"
            )
        is_answered = turn.message is not None and turn.message.channel == "final"
        if turn.message and (kind != "function_call" or is_answered):
            yield _closed(turn, weight)
            turn = _Turn()
        message = _message(item) if kind == "message" else None
        if kind == "reasoning":
            turn.thinking += [_reasoning_text(part) for part in (item["content"] or Field([])).items()]
        elif kind == "function_call":
            turn.message = turn.message or ChatMessage(item, "assistant", Field(None, item.path))
            turn.calls.append(ChatCall(item["name"], item["arguments"], item["call_id"]))
        elif message and message.role == "assistant":
            turn.message = message
        elif turn.thinking:
            raise item.error(f"comes after {ASTRAY}")
        else:
            yield message or ChatMessage(item, "tool", item["output"], call_id=item["call_id"])
    if turn.message:
        yield _closed(turn, weight)
    elif turn.thinking:
        raise items[-1].error(f"is the end of {ASTRAY}")


def _closed(turn: _Turn, weight: float) -> ChatMessage:
    assert turn.message is not None
    return replace(turn.message, thinking="\n\n".join(turn.thinking), calls=tuple(turn.calls), weight=weight)


def _message(item: Field) -> ChatMessage:
    role, phase = item["role"].text(), item["phase"]
    if role not in ROLES:
        raise item["role"].error(f"{role!r} is not a role; use one of {', '.join(ROLES)}")
    if phase and phase.text() not in PHASES:
        raise phase.error(f"{phase.value!r} is not a phase; use one of {', '.join(PHASES)}")
    return ChatMessage(item, ROLES[role], item["content"], channel=PHASES[phase.value] if phase else None)


def _reasoning_text(part: Field) -> str:
    if part["type"].value != "reasoning_text":
        raise part["type"].error(f"{part['type'].value!r} cannot be reasoning; use 'reasoning_text'")
    return part["text"].text()
