"""Alpaca rows: `instruction` and `output`; `input`, `system` and `history` where there are any.

`input` follows the instruction after an empty line. `history` is a list of `[question, answer]` pairs before it.
"""

from collections.abc import Mapping
from typing import Any

from gptoss_ft.data.schemas.chat import DEFAULTS, ChatMessage, conversation_of
from gptoss_ft.data.schemas.fields import Field
from gptoss_ft.data.schemas.sharegpt import split_thinking
from gptoss_ft.harmony.conversation import Conversation


def recognises(row: Mapping[str, Any]) -> str | None:
    """Why the row is of this format; None if it is not."""
    return "it has `instruction` and `output`" if {"instruction", "output"} <= row.keys() else None


def read_alpaca_row(row: Mapping[str, Any], *, defaults: Conversation = DEFAULTS) -> Conversation:
    """The conversation of a row.

    Raises:
        UserError: naming the field, if the row is not of this format.
    """
    fields = Field(row)
    chat = [ChatMessage(fields["system"], "system", fields["system"])] if fields["system"] else []
    for pair in fields["history"].parsed_list() if fields["history"] else []:
        turns = pair.items()
        if len(turns) != 2:
            raise pair.error(f"must be a pair of question and answer, not {len(turns)} texts")
        chat += [ChatMessage(turns[0], "user", turns[0]), _answer(turns[1])]
    question = "\n\n".join(filter(None, (fields["instruction"].text(), fields["input"].joined_text())))
    chat += [ChatMessage(fields["instruction"], "user", Field(question, "instruction")), _answer(fields["output"])]
    return conversation_of(chat, fields, tools=fields["tools"], defaults=defaults)


def _answer(text: Field) -> ChatMessage:
    thinking, answer = split_thinking(text)
    return ChatMessage(text, "assistant", answer, thinking=thinking)
