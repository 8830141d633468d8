"""Every row format by name, the most particular first."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gptoss_ft.data.schemas import (
    alpaca,
    harmony_text,
    messages,
    multilingual_thinking,
    openai_chat,
    openai_preference,
    openai_responses,
    openai_rft,
    preference,
    prompt_completion,
    sharegpt,
)
from gptoss_ft.harmony.conversation import Conversation


@dataclass(frozen=True)
class Reader:
    """How rows of a format are told and read.

    `covers` names the formats whose rows it reads as well, so that a file with rows of both is read by this one.
    `remark` says what a user might not expect.
    """

    recognises: Callable[[Mapping[str, Any]], str | None]
    read: Callable[..., Conversation]
    covers: tuple[str, ...] = ()
    has_answers: bool = True
    remark: str = ""


CHOSEN_ONLY = "only the preferred answer is learned, the other is left out"
READERS: dict[str, Reader] = {
    "harmony": Reader(harmony_text.recognises, harmony_text.read_harmony_row),
    "openai_responses": Reader(
        openai_responses.recognises,
        openai_responses.read_responses_row,
        remark="encrypted reasoning and summaries of reasoning are left out",
    ),
    "openai_preference": Reader(
        openai_preference.recognises, openai_preference.read_openai_preference_row, remark=CHOSEN_ONLY
    ),
    "preference": Reader(preference.recognises, preference.read_preference_row, remark=CHOSEN_ONLY),
    "multilingual_thinking": Reader(
        multilingual_thinking.recognises, multilingual_thinking.read_multilingual_thinking_row
    ),
    "openai_rft": Reader(
        openai_rft.recognises,
        openai_rft.read_rft_prompt,
        has_answers=False,
        remark="prompts for reinforcement learning, with no answer to learn from",
    ),
    "openai_chat": Reader(openai_chat.recognises, openai_chat.read_openai_chat_row, covers=("messages", "openai_rft")),
    "messages": Reader(messages.recognises, messages.read_messages_row, covers=("openai_rft",)),
    "prompt_completion": Reader(
        prompt_completion.recognises,
        prompt_completion.read_prompt_completion_row,
        remark="only the completion has loss",
    ),
    "sharegpt": Reader(sharegpt.recognises, sharegpt.read_sharegpt_row),
    "alpaca": Reader(alpaca.recognises, alpaca.read_alpaca_row),
}
