"""OpenAI's preference rows: `input` with messages and tools, `preferred_output` and `non_preferred_output`.

The older names `preferred_completion` and `non_preferred_completion` are read too. Supervised fine-tuning learns the
preferred output; the other is read, so that its faults are found, and left out.
"""

from collections.abc import Mapping
from typing import Any

from gptoss_ft.data.schemas.chat import DEFAULTS
from gptoss_ft.data.schemas.fields import Field
from gptoss_ft.data.schemas.openai_chat import current_tools, openai_message
from gptoss_ft.data.schemas.preference import pair_side
from gptoss_ft.harmony.conversation import Conversation

PREFERRED = ("preferred_output", "preferred_completion")
NON_PREFERRED = ("non_preferred_output", "non_preferred_completion")


def recognises(row: Mapping[str, Any]) -> str | None:
    """Why the row is of this format; None if it is not."""
    found = next((key for key in PREFERRED if key in row), None)
    return f"it has `{found}`" if found else None


def read_openai_preference_row(row: Mapping[str, Any], *, defaults: Conversation = DEFAULTS) -> Conversation:
    """The input and the preferred output, which alone has loss; raises as `read_openai_preference_pair` does."""
    return read_openai_preference_pair(row, defaults=defaults)[0]


def read_openai_preference_pair(
    row: Mapping[str, Any], *, defaults: Conversation = DEFAULTS
) -> tuple[Conversation, Conversation]:
    """The preferred and the other conversation of a row.

    Raises:
        UserError: naming the field, if the row is not of this format, or an output does not come from the assistant.
    """
    fields = Field(row)
    given = Field(fields["input"].parsed().value, "input")
    prompt = [openai_message(entry, has_loss=False) for entry in given["messages"].parsed_list()]
    tools = current_tools(given)

    def conversation(names: tuple[str, ...]) -> Conversation:
        output = next((fields[name] for name in names if fields[name]), fields[names[0]])
        answer = [openai_message(entry) for entry in output.parsed_list()]
        return pair_side(prompt, answer, fields, output, tools, defaults)

    return conversation(PREFERRED), conversation(NON_PREFERRED)
