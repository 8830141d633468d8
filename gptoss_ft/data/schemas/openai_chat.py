"""OpenAI's chat fine-tuning rows: `messages` with `weight`, `tools`, `parallel_tool_calls`, deprecated `functions`.

`functions` and `function_call` are read as the `tools` and `tool_calls` that replaced them, a `function` message as a
tool's result, a `refusal` as the final answer that it is. `parallel_tool_calls` changes nothing: gpt-oss stops at
each call, so that several calls of one message become generations of their own in any case.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gptoss_ft.data.schemas.chat import DEFAULTS, ChatCall, ChatMessage, conversation_of, require_answer
from gptoss_ft.data.schemas.fields import Field
from gptoss_ft.data.schemas.messages import chat_message
from gptoss_ft.harmony.conversation import Conversation

ROW_KEYS = ("functions", "parallel_tool_calls")
MESSAGE_KEYS = ("weight", "refusal", "function_call")


def recognises(row: Mapping[str, Any]) -> str | None:
    """Why the row is of this format; None if it is not, or nothing tells it from Hugging Face's `messages`."""
    messages = row.get("messages")
    if not isinstance(messages, list):
        return None
    found = [key for key in ROW_KEYS if row.get(key) is not None]
    found += [key for key in MESSAGE_KEYS if any(isinstance(m, dict) and m.get(key) is not None for m in messages)]
    return f"it has `messages` and OpenAI's `{found[0]}`" if found else None


def read_openai_chat_row(row: Mapping[str, Any], *, defaults: Conversation = DEFAULTS) -> Conversation:
    """The conversation of a row.

    Raises:
        UserError: naming the field, if the row is not of this format or has no assistant message.
    """
    fields = Field(row)
    chat = [openai_message(entry) for entry in fields["messages"].parsed_list()]
    require_answer(chat, fields["messages"])
    return conversation_of(chat, fields, tools=current_tools(fields), defaults=defaults)


def current_tools(fields: Field) -> Field:
    """`tools`, or the deprecated `functions` as tools.

    Raises:
        FieldError: if there are both, which OpenAI refuses too.
    """
    tools, functions = fields["tools"], fields["functions"]
    if tools and functions:
        raise functions.error("is deprecated and `tools` is there too; keep one of them")
    parallel = fields["parallel_tool_calls"]
    if parallel and not isinstance(parallel.value, bool):
        raise parallel.error(f"must be true or false, not {parallel.value!r}")
    return functions or tools


def openai_message(entry: Field, *, has_loss: bool = True) -> ChatMessage:
    """`chat_message` for today's spelling and the deprecated ones."""
    call, refusal = entry["function_call"], entry["refusal"]
    kept = {key: value for key, value in entry.object().items() if key != "function_call"}
    if kept.get("role") == "function":
        kept["role"] = "tool"
    message = chat_message(Field(kept, entry.path), has_loss=has_loss)
    if call:
        if message.calls:
            raise call.error("is deprecated and `tool_calls` is there too; keep one of them")
        message = replace(message, calls=(ChatCall(call["name"], call["arguments"]),))
    if refusal:
        if message.text:
            raise refusal.error("stands beside `content`; a message is one or the other")
        message = replace(message, content=refusal)
    return message
