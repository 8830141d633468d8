"""Rows in Hugging Face's `messages` format, as chat templates take them.

A row has `messages` and may have `tools`, `response_format`, and `reasoning_effort`, `model_identity` and
`builtin_tools`, the last three also inside `chat_template_kwargs`. A message has `role` and `content`; an assistant's
may have `thinking` (or `reasoning_content`, `reasoning`), `tool_calls`, `channel` (that of its content), `weight` (that
of its loss, 0 for none) and `train` (false for none).
"""

from collections.abc import Mapping
from typing import Any, cast

from gptoss_ft.data.schemas.chat import DEFAULTS, ChatCall, ChatMessage, ChatRole, conversation_of, require_answer
from gptoss_ft.data.schemas.fields import Field
from gptoss_ft.harmony.conversation import CHANNELS, Channel, Conversation

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_WEIGHT = 1_000_000
THINKING_KEYS = ("thinking", "reasoning_content", "reasoning")


def recognises(row: Mapping[str, Any]) -> str | None:
    """Why the row is of this format; None if it is not."""
    return "it has a list of `messages`" if isinstance(row.get("messages"), list) else None


def read_messages_row(row: Mapping[str, Any], *, defaults: Conversation = DEFAULTS) -> Conversation:
    """The conversation of a row.

    Raises:
        UserError: naming the field, if the row is not of this format or has no assistant message.
    """
    fields = Field(row)
    chat = [chat_message(entry) for entry in fields["messages"].parsed_list()]
    require_answer(chat, fields["messages"])
    return conversation_of(chat, fields, tools=fields["tools"], defaults=defaults)


def chat_message(entry: Field, *, has_loss: bool = True) -> ChatMessage:
    """One entry of a list of messages.

    Args:
        has_loss: False where the list is a prompt: what the assistant says there is read and not learned.
    """
    role = entry["role"].text()
    if role not in ROLES:
        raise entry["role"].error(f"{role!r} is not a role; use one of {', '.join(ROLES)}")
    if entry["function_call"]:
        raise entry["function_call"].error("is OpenAI's older spelling; name data.format=openai_chat to read it")
    is_assistant = role == "assistant"
    if is_assistant and entry["recipient"]:
        raise entry["recipient"].error("makes a call in harmony's own spelling; write it as one of `tool_calls`")
    thinking = next(filter(None, (entry[key].joined_text() for key in THINKING_KEYS)), "") if is_assistant else ""
    calls = entry["tool_calls"].parsed_list() if is_assistant and entry["tool_calls"] else []
    return ChatMessage(
        entry=entry,
        role=cast(ChatRole, role),
        content=entry["content"],
        thinking=thinking,
        channel=_channel(entry) if is_assistant else None,
        calls=tuple(ChatCall(call["function"]["name"], call["function"]["arguments"], call["id"]) for call in calls),
        call_id=entry["tool_call_id"],
        name=entry["name"],
        weight=_weight(entry) if has_loss and is_assistant else 0.0,
    )


def _channel(entry: Field) -> Channel | None:
    """The channel that a message names for its content, as rows do that were split up from harmony."""
    named = entry["channel"]
    if named and named.value not in CHANNELS:
        raise named.error(f"{named.value!r} is not a channel; use one of {', '.join(CHANNELS)}")
    return cast(Channel | None, named.value)


def _weight(entry: Field) -> float:
    """An assistant message's own `weight`, times 0 if `train` is false."""
    weight, train = entry["weight"], entry["train"]
    if train and not isinstance(train.value, bool):
        raise train.error(f"must be true or false, not {train.value!r}")
    number = weight.value if weight else 1.0
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number <= MAX_WEIGHT:
        raise weight.error(
            f"must be 0 (no loss on this message) or a number up to {MAX_WEIGHT:,}, not {weight.value!r}"
        )
    return 0.0 if train.value is False else float(number)
