"""Rows in Hugging Face's `messages` format, as chat templates take them.

A row has `messages` and may have `tools`, `reasoning_effort` and `model_identity`, the last two also inside
`chat_template_kwargs`. A message has `role` and `content`; an assistant's may have `thinking` (or
`reasoning_content`, `reasoning`), `tool_calls` and `weight` (0: no loss on it).

In harmony, system and developer messages are the developer's instructions; thinking goes to the analysis channel,
calls and the text beside them to commentary, any other answer to final. Each tool result is moved right behind its
call, where a serving loop puts it, since the model stops at every call.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import takewhile
from typing import Any

from gptoss_ft.data.schemas.fields import Field
from gptoss_ft.data.schemas.functions import call_arguments, read_tools, safe_name
from gptoss_ft.harmony.conversation import (
    FUNCTIONS,
    REASONING_EFFORTS,
    Conversation,
    Message,
    ReasoningEffort,
    Tool,
)

DEFAULTS = Conversation(messages=())
ROLES = ("system", "developer", "user", "assistant", "tool")
THINKING_KEYS = ("thinking", "reasoning_content", "reasoning")


def read_messages_row(row: Mapping[str, Any], *, defaults: Conversation = DEFAULTS) -> Conversation:
    """The conversation of a row; what it does not say about the system message is taken from `defaults`.

    Raises:
        UserError: naming the field, if the row is not of this format or has no assistant message.
    """
    fields = Field(row)
    entries = fields["messages"].items()
    if not any(_role(entry) == "assistant" for entry in entries):
        raise fields["messages"].error("has no assistant message, so there is nothing to learn; remove the row")
    leading = list(takewhile(_gives_instructions, entries))
    tools = read_tools(fields["tools"])
    return replace(
        defaults,
        messages=tuple(_messages(entries[len(leading) :], tools)),
        tools=tools,
        instructions="\n\n".join(text for text in map(_content, leading) if text) or None,
        reasoning_effort=_reasoning_effort(fields) or defaults.reasoning_effort,
        model_identity=_setting(fields, "model_identity").joined_text() or defaults.model_identity,
    )


def _messages(entries: list[Field], tools: tuple[Tool, ...]) -> Iterator[Message]:
    """Harmony messages in the order of a serving loop."""
    messages: list[Message] = []
    results: dict[int, Message] = {}
    # Calls without a result yet: their position in `messages` and their id.
    open_calls: dict[int, str | None] = {}
    for entry in entries:
        match _role(entry):
            case "tool":
                position = _answered_call(entry, messages, open_calls)
                del open_calls[position]
                results[position] = _tool_result(entry, messages[position])
            case "assistant":
                for message, call_id in _assistant_messages(entry, tools):
                    if message.is_call:
                        open_calls[len(messages)] = call_id
                    elif message.is_final:
                        open_calls.clear()
                    messages.append(message)
            case role:
                open_calls.clear()
                messages.append(Message("user" if role == "user" else "developer", _required_content(entry)))
    for position, message in enumerate(messages):
        yield message
        if position in results:
            yield results[position]


def _assistant_messages(entry: Field, tools: tuple[Tool, ...]) -> Iterator[tuple[Message, str | None]]:
    """Thinking, then a final answer or a preamble with its calls; each call comes with its id."""
    calls = entry["tool_calls"].items() if entry["tool_calls"] else []
    content = _content(entry)
    if not content and not calls:
        raise entry.error("an assistant message needs content or tool_calls, as the model never stops after thinking")
    weight = _weight(entry["weight"])
    thinking = next(filter(None, (entry[key].joined_text() for key in THINKING_KEYS)), None)
    if thinking:
        yield Message("assistant", thinking, "analysis", weight=weight), None
    if content:
        yield Message("assistant", content, "commentary" if calls else "final", weight=weight), None
    for call in calls:
        function = call["function"]
        name = safe_name(function["name"])
        if tools and name not in {tool.name for tool in tools}:
            raise function["name"].error(f"{name!r} is not among the row's tools; add it there or remove the call")
        arguments = call_arguments(function["arguments"])
        message = Message("assistant", arguments, "commentary", f"{FUNCTIONS}.{name}", "json", weight=weight)
        yield message, call["id"].text() if call["id"] else None


def _answered_call(entry: Field, messages: list[Message], open_calls: Mapping[int, str | None]) -> int:
    """Position of the call that a tool message answers: by `tool_call_id`, else by `name`, else the first open one."""
    if not open_calls:
        raise entry.error("is a tool result without a call before it; add the assistant's tool_calls or remove it")
    call_id, name = entry["tool_call_id"], entry["name"]
    candidates = list(open_calls)
    if call_id:
        by_id = [position for position in open_calls if open_calls[position] == call_id.text()]
        candidates = by_id or [position for position in open_calls if open_calls[position] is None]
        if not candidates:
            raise call_id.error(f"{call_id.value!r} is not the id of an open call; those are {[*open_calls.values()]}")
        if by_id:
            return by_id[0]
    if name:
        recipient = f"{FUNCTIONS}.{safe_name(name)}"
        candidates = [position for position in candidates if messages[position].recipient == recipient]
        if not candidates:
            raise name.error(f"no open call is to {name.value!r}; name the function that was called")
    return candidates[0]


def _tool_result(entry: Field, call: Message) -> Message:
    content = entry["content"]
    is_object = isinstance(content.value, Mapping)
    text = json.dumps(content.value, ensure_ascii=False) if is_object else content.joined_text()
    return Message("tool", text, "commentary", recipient="assistant", name=call.recipient)


def _role(entry: Field) -> str:
    role = entry["role"].text()
    if role not in ROLES:
        raise entry["role"].error(f"{role!r} is not a role; use one of {', '.join(ROLES)}")
    return role


def _gives_instructions(entry: Field) -> bool:
    return _role(entry) in ("system", "developer")


def _content(entry: Field) -> str:
    return entry["content"].joined_text()


def _required_content(entry: Field) -> str:
    if content := _content(entry):
        return content
    raise entry["content"].error("is empty; give it text or remove the message")


def _weight(weight: Field) -> float:
    if weight.value not in (None, 0, 1):
        raise weight.error(f"must be 0 (no loss on this message) or 1, not {weight.value!r}")
    return 1.0 if weight.value is None else float(weight.value)


def _reasoning_effort(fields: Field) -> ReasoningEffort | None:
    effort = _setting(fields, "reasoning_effort")
    if not effort:
        return None
    for known in REASONING_EFFORTS:
        if effort.value == known:
            return known
    raise effort.error(f"{effort.value!r} is not an effort; use one of {', '.join(REASONING_EFFORTS)}")


def _setting(fields: Field, key: str) -> Field:
    """A row's own setting, else the one among its `chat_template_kwargs`."""
    template = fields["chat_template_kwargs"]
    return fields[key] if fields[key] or not template else template[key]
