"""TRL's `prompt` and `completion`, texts or lists of messages; only the completion has loss.

A row with `label: false` (TRL's format for unpaired preferences) shows what not to say: it gets no loss at all.
"""

from collections.abc import Mapping
from typing import Any

from gptoss_ft.data.schemas.chat import DEFAULTS, ChatMessage, ChatRole, conversation_of
from gptoss_ft.data.schemas.fields import Field, is_json_list
from gptoss_ft.data.schemas.messages import chat_message
from gptoss_ft.harmony.conversation import Conversation

CONTROL = "<|start|>"


def recognises(row: Mapping[str, Any]) -> str | None:
    """Why the row is of this format; None if it is not."""
    return "it has `prompt` and `completion`" if {"prompt", "completion"} <= row.keys() else None


def read_prompt_completion_row(row: Mapping[str, Any], *, defaults: Conversation = DEFAULTS) -> Conversation:
    """The conversation of a row.

    Raises:
        UserError: naming the field, if the row is not of this format, or the completion does not begin with the
            assistant.
    """
    fields = Field(row)
    prompt, completion, label = fields["prompt"], fields["completion"], fields["label"]
    if label and not isinstance(label.value, bool):
        raise label.error(f"must be true (a good completion) or false, not {label.value!r}")
    is_good = label.value is not False
    chat = side(prompt, "user", has_loss=False)
    answer = side(completion, "assistant", has_loss=is_good)
    if not answer or answer[0].role != "assistant":
        raise completion.error("must begin with the assistant after the prompt")
    return conversation_of([*chat, *answer], fields, tools=fields["tools"], defaults=defaults)


def side(field: Field, role: ChatRole, *, has_loss: bool) -> list[ChatMessage]:
    """What one side of a row says: messages, or a text as one message of `role`."""
    if isinstance(field.value, str) and not is_json_list(field.value):
        return [text_message(field, role, has_loss=has_loss)]
    return [chat_message(entry, has_loss=has_loss) for entry in field.parsed_list()]


def text_message(field: Field, role: ChatRole, *, has_loss: bool = True) -> ChatMessage:
    """A text as one message.

    Raises:
        FieldError: if it is rendered harmony, whose control tokens would be learned as text.
    """
    if CONTROL in field.text():
        raise field.error(
            f"is rendered harmony ({CONTROL}); put prompt and completion end to end into one column `text`"
        )
    if not field.value:
        raise field.error("is empty; give it text or remove the row")
    return ChatMessage(field, role, field, weight=float(has_loss))
