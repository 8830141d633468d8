"""TRL's preference rows: `chosen`, `rejected` and, unless these begin with it, `prompt`; texts or messages.

Supervised fine-tuning learns the chosen answer; the rejected one is read, so that its faults are found, and left out.
"""

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from gptoss_ft.data.schemas.chat import DEFAULTS, ChatMessage, conversation_of
from gptoss_ft.data.schemas.fields import Field
from gptoss_ft.data.schemas.messages import chat_message
from gptoss_ft.data.schemas.prompt_completion import side
from gptoss_ft.harmony.conversation import Conversation


def recognises(row: Mapping[str, Any]) -> str | None:
    """Why the row is of this format; None if it is not."""
    return "it has `chosen` and `rejected`" if {"chosen", "rejected"} <= row.keys() else None


def read_preference_row(row: Mapping[str, Any], *, defaults: Conversation = DEFAULTS) -> Conversation:
    """The prompt and the chosen answer, which alone has loss; raises as `read_preference_pair` does."""
    return read_preference_pair(row, defaults=defaults)[0]


def read_preference_pair(
    row: Mapping[str, Any], *, defaults: Conversation = DEFAULTS
) -> tuple[Conversation, Conversation]:
    """The chosen and the rejected conversation of a row.

    Raises:
        UserError: naming the field, if the row is not of this format, or an answer does not come from the assistant.
    """
    fields = Field(row)
    prompt = side(fields["prompt"], "user", has_loss=False) if fields["prompt"] else []
    answers = [side(fields[key], "assistant", has_loss=True) for key in ("chosen", "rejected")]
    # Whole dialogues, as in UltraFeedback; a prompt beside them says again what they begin with.
    if not prompt or all(answer and answer[0].role != "assistant" for answer in answers):
        shared = answers[0][: _shared_prompt(*answers)]
        if not shared:
            if prompt:
                raise fields["rejected"].error("must begin with the assistant or, after a prompt, as `chosen` does")
            raise fields["prompt"].error("is absent, and `chosen` and `rejected` do not begin with the same messages")
        if prompt and _contents(prompt) not in (_contents(shared[: len(prompt)]), _contents(shared[-len(prompt) :])):
            raise fields["prompt"].error(
                "is not what `chosen` and `rejected` begin with: remove it, or repeat it there"
            )
        prompt = [chat_message(message.entry, has_loss=False) for message in shared]
        answers = [answer[len(shared) :] for answer in answers]
    chosen, rejected = (
        pair_side(prompt, answer, fields, fields[key], fields["tools"], defaults)
        for key, answer in zip(("chosen", "rejected"), answers, strict=True)
    )
    return chosen, rejected


def pair_side(
    prompt: Sequence[ChatMessage],
    answer: Sequence[ChatMessage],
    row: Field,
    field: Field,
    tools: Field,
    defaults: Conversation,
) -> Conversation:
    """A prompt with one of its answers, which `field` holds; shared with OpenAI's format."""
    if not answer or answer[0].role != "assistant":
        raise field.error("must begin with the assistant after the prompt")
    return conversation_of([*prompt, *answer], row, tools=tools, defaults=defaults)


def _contents(messages: Sequence[ChatMessage]) -> list[object]:
    return [message.content.value for message in messages]


def _shared_prompt(chosen: Sequence[ChatMessage], rejected: Sequence[ChatMessage]) -> int:
    """Number of messages that both answers begin with."""
    same = takewhile(lambda pair: pair[0].entry.value == pair[1].entry.value, zip(chosen, rejected, strict=False))
    return sum(1 for _ in same)
