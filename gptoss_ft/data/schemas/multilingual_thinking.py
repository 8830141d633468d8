"""Rows with the columns of Hugging Face's Multilingual-Thinking: one question, its reasoning and its answer.

Columns: `user`, `analysis`, `final`; `developer` and `reasoning_language` if there are instructions, which are then
spelled as the data set's own `messages` column spells them.
"""

from collections.abc import Mapping
from typing import Any

from gptoss_ft.data.schemas.chat import DEFAULTS, ChatMessage, conversation_of
from gptoss_ft.data.schemas.fields import Field
from gptoss_ft.harmony.conversation import Conversation


def recognises(row: Mapping[str, Any]) -> str | None:
    """Why the row is of this format; None if it is not."""
    return "it has the columns `user`, `analysis` and `final`" if {"user", "analysis", "final"} <= row.keys() else None


def read_multilingual_thinking_row(row: Mapping[str, Any], *, defaults: Conversation = DEFAULTS) -> Conversation:
    """The conversation of a row.

    Raises:
        UserError: naming the field, if the row is not of this format.
    """
    fields = Field(row)
    language, developer = fields["reasoning_language"].joined_text(), fields["developer"].joined_text()
    instructions = "\n\n".join(filter(None, (f"reasoning language: {language}" if language else "", developer)))
    chat = [
        ChatMessage(fields["developer"], "developer", Field(instructions, "developer")),
        ChatMessage(fields["user"], "user", fields["user"]),
        ChatMessage(fields["final"], "assistant", fields["final"], thinking=fields["analysis"].joined_text()),
    ]
    return conversation_of(chat, fields, tools=fields["tools"], defaults=defaults)
