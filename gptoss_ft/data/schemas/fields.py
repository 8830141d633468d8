"""Typed access to a row of unknown quality; every error names the field and the cure."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gptoss_ft.data.strict_json import parse_json
from gptoss_ft.errors import UserError


@dataclass(frozen=True)
class Field:
    """A value and its path in the row, such as `messages[3].content`. Absent and null are the same."""

    value: Any
    path: str = ""

    def __getitem__(self, key: str) -> "Field":
        path = f"{self.path}.{key}" if self.path else key
        return Field(self.object().get(key), path)

    def __bool__(self) -> bool:
        return self.value is not None

    def object(self) -> Mapping[str, Any]:
        if not isinstance(self.value, Mapping):
            raise self.error(f"must be a JSON object, not {self._kind()}")
        return self.value

    def items(self) -> list["Field"]:
        if not isinstance(self.value, list):
            raise self.error(f"must be a list, not {self._kind()}")
        return [Field(item, f"{self.path}[{index}]") for index, item in enumerate(self.value)]

    def text(self) -> str:
        if not isinstance(self.value, str):
            raise self.error(f"must be text, not {self._kind()}")
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

    def joined_text(self) -> str:
        """Text given whole or as a list of text parts; empty if absent."""
        if not self:
            return ""
        if not isinstance(self.value, list):
            return self.text()
        return "".join(part.value if isinstance(part.value, str) else _part_text(part) for part in self.items())

    def error(self, problem: str) -> UserError:
        return UserError(f"{self.path or 'row'}: {problem}")

    def _kind(self) -> str:
        return "absent or null" if self.value is None else type(self.value).__name__


def _part_text(part: Field) -> str:
    kind = part["type"].value
    if kind not in ("text", None):
        raise part["type"].error(f"{kind!r} content cannot be used, gpt-oss reads text only; remove this part")
    return part["text"].text()
