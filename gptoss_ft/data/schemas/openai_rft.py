"""OpenAI's rows for reinforcement fine-tuning: `messages` that end with the user, and whatever a grader looks up.

There is no answer to learn from, so supervised fine-tuning refuses them; `RftRow` keeps what a grader needs.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gptoss_ft.data.schemas.chat import DEFAULTS, conversation_of
from gptoss_ft.data.schemas.fields import Field
from gptoss_ft.data.schemas.openai_chat import current_tools, openai_message
from gptoss_ft.harmony.conversation import Conversation

# Grader types and the keys that each has to have, by openai-python 3.54 (`openai.types.graders`).
GRADERS: dict[str, tuple[str, ...]] = {
    "string_check": ("input", "reference", "operation"),
    "text_similarity": ("input", "reference", "evaluation_metric"),
    "python": ("source",),
    "score_model": ("input", "model"),
    "label_model": ("input", "labels", "passing_labels", "model"),
    "multi": ("graders", "calculate_output"),
}
PROMPT_KEYS = ("messages", "tools", "functions", "parallel_tool_calls", "reasoning_effort", "model_identity")
TEMPLATE = re.compile(r"\{\{\s*(\w+)\.([\w.]+)\s*\}\}")


@dataclass(frozen=True)
class RftRow:
    """A prompt; `item` is what templates call `item.x`; `grader` is the row's own, None if the run has one for all."""

    prompt: Conversation
    item: Mapping[str, Any]
    grader: Mapping[str, Any] | None


def recognises(row: Mapping[str, Any]) -> str | None:
    """Why the row is of this format; None if it is not."""
    messages = row.get("messages")
    if not (isinstance(messages, list) and messages and isinstance(messages[-1], dict)):
        return None
    return "its `messages` end with the user" if messages[-1].get("role") == "user" else None


def read_rft_prompt(row: Mapping[str, Any], *, defaults: Conversation = DEFAULTS) -> Conversation:
    """The prompt of a row, a conversation without an answer to its last message."""
    return read_rft_row(row, defaults=defaults).prompt


def read_rft_row(row: Mapping[str, Any], *, defaults: Conversation = DEFAULTS) -> RftRow:
    """A row with everything that grading takes.

    Raises:
        UserError: naming the field, if the messages do not end with the user, or the row's grader is of no known
            type, lacks a key or looks up what the row does not have.
    """
    fields = Field(row)
    chat = [openai_message(entry, has_loss=False) for entry in fields["messages"].parsed_list()]
    if not chat or chat[-1].role != "user":
        raise fields["messages"].error("must end with the user, as the model's answer is what gets graded")
    tools = current_tools(fields)
    prompt = conversation_of(chat, fields, tools=tools, defaults=defaults)
    item = {key: value for key, value in row.items() if key not in (*PROMPT_KEYS, "grader")}
    grader = fields["grader"].parsed() if fields["grader"] else None
    if grader is not None:
        check_grader(grader, item)
    return RftRow(prompt, item, None if grader is None else grader.object())


def check_grader(grader: Field, item: Mapping[str, Any]) -> None:
    """Raise `FieldError` unless the grader can run on this row.

    Args:
        item: the row's own columns, which templates look up as `{{item.x}}`.
    """
    kind = grader["type"].text()
    if kind not in GRADERS:
        raise grader["type"].error(f"{kind!r} is not a grader; use one of {', '.join(GRADERS)}")
    for key in GRADERS[kind]:
        if not grader[key]:
            raise grader[key].error(f"is absent; a {kind} grader needs {', '.join(GRADERS[kind])}")
    if kind == "multi":
        for name in grader["graders"].object():
            check_grader(grader["graders"][name], item)
        return
    for template in _texts(grader):
        for source, path in TEMPLATE.findall(template.value):
            if source not in ("item", "sample"):
                raise template.error(f"{{{{{source}.{path}}}}} is unknown; templates begin with item. or sample.")
            first = path.partition(".")[0]
            if source == "item" and first not in item:
                raise template.error(f"{{{{item.{path}}}}} looks up `{first}`, which the row does not have")


def _texts(tree: Field) -> Iterator[Field]:
    match tree.value:
        case str():
            yield tree
        case Mapping():
            for name in tree.value:
                # A program is no template: double braces in it are its own.
                if name != "source":
                    yield from _texts(tree[name])
        case list():
            for item in tree.items():
                yield from _texts(item)
