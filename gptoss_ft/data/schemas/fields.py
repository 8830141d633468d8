"""Typed access to a row of unknown quality; every error names the field and the cure."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gptoss_ft.data.strict_json import parse_json
from gptoss_ft.errors import UserError

# tiktoken's regular expression overflows its stack on a run of a million; a tenth of that is no text either.
MAX_WHITE_SPACE = 100_000
TEXT_PARTS = ("text", "input_text", "output_text", None)


class FieldError(UserError):
    """A row's fault with the path of the field, such as `messages[3].content`; empty for the row as a whole."""

    def __init__(self, field: str, problem: str):
        super().__init__(f"{field or 'row'}: {problem}")
        self.field = field
        self.problem = problem

    def __reduce__(self) -> tuple[type["FieldError"], tuple[str, str]]:
        return FieldError, (self.field, self.problem)


@dataclass(slots=True, unsafe_hash=True)
class Field:
    """A value and its path in the row, such as `messages[3].content`. Absent and null are the same.

    Never changed, but not frozen: a row makes some fifty, and frozen ones take three times as long to make.
    """

    value: Any
    path: str = ""

    def __getitem__(self, key: str) -> "Field":
        path = f"{self.path}.{key}" if self.path else key
        return Field(self.object().get(key), path)

    def __bool__(self) -> bool:
        return self.value is not None

    def object(self) -> Mapping[str, Any]:
        if not isinstance(self.value, dict | Mapping):
            raise self.error(f"must be a JSON object, not {self._kind()}")
        return self.value

    def items(self) -> list["Field"]:
        if not isinstance(self.value, list):
            raise self.error(f"must be a list, not {self._kind()}")
        return [Field(item, f"{self.path}[{index}]") for index, item in enumerate(self.value)]

    def text(self) -> str:
        if not isinstance(self.value, str):
            raise self.error(f"must be text, not {self._kind()}")
        if fault := text_fault(self.value):
            raise self.error(fault)
        return self.value

    def parsed(self) -> "Field":
        """The value that a JSON string holds; any other value as it is.

        Table formats cannot hold objects of varying keys, so data sets store them as JSON strings.
        """
        if not isinstance(self.value, str):
            return self

        try:
            return Field(parse_json(self.value), self.path)
        except json.JSONDecodeError as error:
            raise self.error(f"is not JSON ({error.msg} at character {error.pos + 1}); mend the string") from error
        except UserError as error:
            raise self.error(str(error)) from error

    def parsed_list(self) -> list["Field"]:
        """The items of a list, or of the list that a JSON string holds, as CSV files and some tables store one."""
        return (self.parsed() if is_json_list(self.value) else self).items()

    def joined_text(self) -> str:
        """Text given whole or as a list of text parts; empty if absent."""
        if not self:
            return ""
        if not isinstance(self.value, list):
            return self.text()
        return "".join(part.text() if isinstance(part.value, str) else _part_text(part) for part in self.items())

    def error(self, problem: str) -> FieldError:
        return FieldError(self.path, problem)

    def _kind(self) -> str:
        return "absent or null" if self.value is None else type(self.value).__name__


def is_json_list(value: Any) -> bool:
    """Whether a string looks like a JSON list."""
    return isinstance(value, str) and value.lstrip()[:1] == "["


def text_fault(text: str) -> str:
    """Why no tokens can be made of a text, with the cure; empty if they can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"character {error.start + 1} is half of a surrogate pair; write the whole character or remove it"
    if len(text) >= MAX_WHITE_SPACE and re.search(rf"\s{{{MAX_WHITE_SPACE}}}", text):
        return f"has {MAX_WHITE_SPACE} white-space characters on end; shorten them"
    return ""


def _part_text(part: Field) -> str:
    kind = part["type"].value
    if kind not in TEXT_PARTS:
        raise part["type"].error(f"{kind!r} content cannot be used, gpt-oss reads text only; remove this part")
    return part["text"].text()
