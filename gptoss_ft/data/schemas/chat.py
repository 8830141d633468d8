"""Chat messages to a harmony conversation, for every row format that comes down to a list of them.

In harmony, system and developer messages are the developer's instructions; thinking goes to the analysis channel,
calls and the text beside them to commentary, any other answer to final. Each tool result is moved right behind its
call, where a serving loop puts it, since the model stops at every call.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Literal

from gptoss_ft.data.schemas.builtin import builtin_call, read_response_format, split_tools
from gptoss_ft.data.schemas.fields import Field
from gptoss_ft.data.schemas.functions import call_arguments, check_values, read_tools, safe_name
from gptoss_ft.harmony.conversation import (
    FUNCTIONS,
    REASONING_EFFORTS,
    BuiltinTool,
    Channel,
    Conversation,
    Message,
    ReasoningEffort,
    Tool,
)

ChatRole = Literal["system", "developer", "user", "assistant", "tool"]
ABSENT = Field(None)
DEFAULTS = Conversation(messages=())  # what a row gets that states nothing


@dataclass(frozen=True)
class ChatCall:
    """A function call; `id` is what its result names it by."""

    name: Field
    arguments: Field
    id: Field = ABSENT


@dataclass(frozen=True)
class ChatMessage:
    """A message in any format's spelling; its fields keep the paths that the row has them at.

    `channel` overrides the one that an assistant's content would go to. `call_id` and `name` are a tool result's.
    """

    entry: Field
    role: ChatRole
    content: Field
    thinking: str = ""
    calls: tuple[ChatCall, ...] = ()
    channel: Channel | None = None
    call_id: Field = ABSENT
    name: Field = ABSENT
    weight: float = 1.0

    @property
    def text(self) -> str:
        return self.content.joined_text()

    @property
    def gives_instructions(self) -> bool:
        return self.role in ("system", "developer")


def conversation_of(
    chat: Sequence[ChatMessage], row: Field, *, tools: Field = ABSENT, defaults: Conversation
) -> Conversation:
    """The conversation of chat messages, with the row's own settings.

    Args:
        row: `reasoning_effort`, `model_identity` and `builtin_tools` are taken from here or from its
            `chat_template_kwargs`; `response_format` from here.
        defaults: gives what the row does not state.

    Raises:
        FieldError: if a message cannot be used.
    """
    leading = list(takewhile(lambda message: message.gives_instructions, chat))
    functions, builtin = split_tools(tools, _setting(row, "builtin_tools"))
    builtin = tuple(dict.fromkeys((*defaults.builtin_tools, *builtin)))
    declared = read_tools(functions, tools)
    return replace(
        defaults,
        messages=tuple(_messages(chat[len(leading) :], declared, builtin)),
        tools=declared,
        builtin_tools=builtin,
        response_formats=read_response_format(row["response_format"]) or defaults.response_formats,
        instructions="\n\n".join(message.text for message in leading if message.text) or None,
        reasoning_effort=_reasoning_effort(row) or defaults.reasoning_effort,
        model_identity=_setting(row, "model_identity").joined_text() or defaults.model_identity,
    )


def require_answer(chat: Sequence[ChatMessage], field: Field) -> None:
    """Raise `FieldError` for `field` unless the assistant says something."""
    if not any(message.role == "assistant" for message in chat):
        raise field.error("has no assistant message, so there is nothing to learn; remove the row")


def _messages(
    chat: Sequence[ChatMessage], tools: tuple[Tool, ...], builtin: tuple[BuiltinTool, ...]
) -> Iterator[Message]:
    """Harmony messages in the order of a serving loop."""
    messages: list[Message] = []
    results: dict[int, Message] = {}
    # Calls without a result yet: their position in `messages` and their id.
    open_calls: dict[int, str | None] = {}
    for message in chat:
        match message.role:
            case "tool":
                position = _answered_call(message, messages, open_calls)
                del open_calls[position]
                results[position] = _tool_result(message.content, messages[position])
            case "assistant":
                for part, call_id in _assistant_messages(message, tools, builtin):
                    if part.is_call:
                        open_calls[len(messages)] = call_id
                    elif part.is_final:
                        open_calls.clear()
                    messages.append(part)
            case role:
                open_calls.clear()
                messages.append(Message("user" if role == "user" else "developer", _required_text(message.content)))
    for position, part in enumerate(messages):
        yield part
        if position in results:
            yield results[position]


def _assistant_messages(
    message: ChatMessage, tools: tuple[Tool, ...], builtin: tuple[BuiltinTool, ...]
) -> Iterator[tuple[Message, str | None]]:
    """Thinking, then a final answer or a preamble with its calls; each call comes with its id."""
    content = message.text
    if not content and not message.calls:
        raise message.entry.error(
            "an assistant message needs content or tool_calls, as the model never stops after thinking"
        )
    if message.thinking:
        yield Message("assistant", message.thinking, "analysis", weight=message.weight), None
    if content:
        channel = message.channel or ("commentary" if message.calls else "final")
        if channel == "final" and message.calls:
            raise message.entry.error("calls a function after its final answer, where the model stops; split it in two")
        yield Message("assistant", content, channel, weight=message.weight), None
    for call in message.calls:
        written = builtin_call(call.name, call.arguments, builtin) or _function_call(call, tools)
        yield replace(written, weight=message.weight), call.id.text() if call.id else None


def _function_call(call: ChatCall, tools: tuple[Tool, ...]) -> Message:
    name = safe_name(call.name)
    if tools and name not in {tool.name for tool in tools}:
        raise call.name.error(f"{name!r} is not among the row's tools; add it there or remove the call")
    return Message("assistant", call_arguments(call.arguments), "commentary", f"{FUNCTIONS}.{name}", "json")


def _answered_call(message: ChatMessage, messages: list[Message], open_calls: Mapping[int, str | None]) -> int:
    """Position of the call that a tool message answers: by id, else by name, else the first open one."""
    if not open_calls:
        raise message.entry.error(
            "is a tool result without a call before it; add the assistant's tool_calls or remove it"
        )
    call_id, name = message.call_id, message.name
    candidates = list(open_calls)
    if call_id:
        by_id = [position for position in open_calls if open_calls[position] == call_id.text()]
        candidates = by_id or [position for position in open_calls if open_calls[position] is None]
        if not candidates:
            raise call_id.error(f"{call_id.value!r} is not the id of an open call; those are {[*open_calls.values()]}")
        if by_id:
            return by_id[0]
    if name:
        recipients = (name.text(), f"{FUNCTIONS}.{safe_name(name)}")
        candidates = [position for position in candidates if messages[position].recipient in recipients]
        if not candidates:
            raise name.error(f"no open call is to {name.value!r}; name the function that was called")
    return candidates[0]


def _tool_result(content: Field, call: Message) -> Message:
    if isinstance(content.value, Mapping):
        check_values(content)
        text = json.dumps(content.value, ensure_ascii=False)
    else:
        text = content.joined_text()
    return Message("tool", text, call.channel, recipient="assistant", name=call.recipient)


def _required_text(content: Field) -> str:
    if text := content.joined_text():
        return text
    raise content.error("is empty; give it text or remove the message")


def _reasoning_effort(row: Field) -> ReasoningEffort | None:
    effort = _setting(row, "reasoning_effort")
    if not effort:
        return None
    for known in REASONING_EFFORTS:
        if effort.value == known:
            return known
    raise effort.error(f"{effort.value!r} is not an effort; use one of {', '.join(REASONING_EFFORTS)}")


def _setting(row: Field, key: str) -> Field:
    """A row's own setting, else the one among its `chat_template_kwargs`."""
    template = row["chat_template_kwargs"].parsed()
    return row[key] if row[key] or not template else template[key]
