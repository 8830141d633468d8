"""Rendered harmony in one column `text` (or `harmony`): `<|start|>` to `<|return|>`, as the model reads and writes it.

The system message and the developer message behind it are kept to the letter, tool declarations included. Everything
the assistant wrote has loss. A call's header may name channel and recipient in either order.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, cast

from gptoss_ft.data.schemas.chat import DEFAULTS
from gptoss_ft.data.schemas.fields import Field
from gptoss_ft.harmony.conversation import CHANNELS, Channel, Conversation, Message

COLUMNS = ("text", "harmony")
INSTRUCTIONS = "# Instructions\n\n"
BLOCK = re.compile(r"<\|start\|>(.*?)<\|message\|>(.*?)<\|(end|call|return)\|>", re.DOTALL)
CONTROL = re.compile(r"<\|(start|message|end|call|return|channel|constrain)\|>")
HEADER = re.compile(
    r"(?P<author>[^\s<]+)"
    r"(?: to=(?P<to_first>[^\s<]+))?"
    r"(?:<\|channel\|>(?P<channel>\w+))?"
    r"(?: to=(?P<to_last>[^\s<]+))?"
    r"(?: ?(?P<constrain><\|constrain\|>)?(?P<content_type>\w+))?\s*"
)


def recognises(row: Mapping[str, Any]) -> str | None:
    """Why the row is of this format; None if it is not."""
    found = next((key for key in COLUMNS if isinstance(row.get(key), str) and "<|start|>" in row[key]), None)
    return f"`{found}` holds <|start|>" if found else None


def read_harmony_row(row: Mapping[str, Any], *, defaults: Conversation = DEFAULTS) -> Conversation:
    """The conversation of a row.

    Raises:
        UserError: naming the field and the message, if the text is not harmony or the assistant says nothing.
    """
    fields = Field(row)
    text = next((fields[key] for key in COLUMNS if fields[key]), fields[COLUMNS[0]])
    messages = list(_messages(text))
    system = developer = None
    if messages and messages[0].name == "system":
        system = messages.pop(0).content
        if messages and messages[0].role == "developer":
            developer = messages.pop(0).content
    if not any(message.role == "assistant" for message in messages):
        raise text.error("has no assistant message, so there is nothing to learn; remove the row")
    effort = re.search(r"^Reasoning: (low|medium|high)$", system or "", re.MULTILINE)
    return replace(
        defaults,
        messages=tuple(_without_heading(message, text) for message in messages),
        reasoning_effort=cast(Any, effort[1]) if effort else defaults.reasoning_effort,
        verbatim_system=system,
        verbatim_developer=developer,
    )


def _messages(text: Field) -> Iterator[Message]:
    """Every message; the system message goes as a developer's of the name "system"."""
    rest, number = text.text().removeprefix("<|startoftext|>").strip(), 0
    while rest:
        found = BLOCK.match(rest)
        if not found or CONTROL.search(found[2]):
            raise text.error(
                f"message {number} is not <|start|>header<|message|>text<|end|>, where it reads {rest[:40]!r}; mend it"
            )
        header = HEADER.fullmatch(found[1])
        if not header:
            raise text.error(f"message {number} has a header that is not harmony's: {found[1][:80]!r}; mend it")
        yield _message(header, found[2], found[3], text, number)
        rest, number = rest[found.end() :].lstrip(), number + 1


def _message(header: re.Match[str], content: str, ending: str, text: Field, number: int) -> Message:
    author, recipient, channel = header["author"], header["to_first"] or header["to_last"], header["channel"]
    role, _, name = author.partition(":")
    if role == "system":
        return Message("developer", content, name="system")
    if role in ("developer", "user"):
        return Message("developer" if role == "developer" else "user", content, name=name or None)
    if channel not in CHANNELS:
        raise text.error(f"message {number} ({author}) is on channel {channel!r}; use one of {', '.join(CHANNELS)}")
    on = cast(Channel, channel)
    if role != "assistant":
        return Message("tool", content, on, recipient, name=author)
    if (ending == "call") != (recipient is not None):
        raise text.error(
            f"message {number} ends in <|{ending}|> {'without' if recipient is None else 'with'} a recipient; "
            "a call has `to=...` and ends in <|call|>, nothing else does"
        )
    constrained = header["constrain"] is not None or header["content_type"] is None
    return Message(
        "assistant", content, on, recipient, header["content_type"], name=name or None, constrained=constrained
    )


def _without_heading(message: Message, text: Field) -> Message:
    """Later developer messages get their heading back when they are rendered."""
    if message.role != "developer":
        return message
    if message.name == "system" or not message.content.startswith(INSTRUCTIONS):
        raise text.error(
            f"a later system message or a developer message without {INSTRUCTIONS!r} cannot be kept; begin with it"
        )
    return replace(message, content=message.content.removeprefix(INSTRUCTIONS))
