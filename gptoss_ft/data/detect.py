"""Which format the rows of a file are in, and why."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gptoss_ft.data.schemas.fields import is_json_list
from gptoss_ft.data.schemas.registry import READERS
from gptoss_ft.data.strict_json import parse_json
from gptoss_ft.errors import UserError

AUTO = "auto"
LISTS = ("messages", "conversations", "input", "output", "items")


@dataclass(frozen=True)
class Detection:
    """A format by name and, for people, the reason it was chosen."""

    format: str
    reason: str

    def __str__(self) -> str:
        remark = READERS[self.format].remark
        return f"format {self.format}, because {self.reason}" + (f" ({remark})" if remark else "")


def detect(rows: Sequence[tuple[int, Mapping[str, Any]]]) -> Detection:
    """The format of a file by its first rows, each with its line.

    Raises:
        UserError: if no format is recognised, or several are.
    """
    found: dict[str, tuple[int, str]] = {}
    for line, row in rows:
        for name, reader in READERS.items():
            if reason := reader.recognises(_with_lists(row)):
                found.setdefault(name, (line, reason))
                break
    if not found:
        columns = ", ".join(map(repr, rows[0][1])) if rows else "none"
        raise UserError(
            f"no known row format has these columns: {columns}; rename them, or name data.format: {', '.join(READERS)}"
        )
    for name in found:
        if found.keys() <= {name, *READERS[name].covers}:
            line, reason = found[name]
            return Detection(name, f"{reason} (line {line})")
    seen = ", ".join(f"{name} in line {line}" for name, (line, _) in found.items())
    raise UserError(f"rows of different formats: {seen}; split the file or name data.format")


def _with_lists(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row with the lists that CSV files and some tables hold as JSON strings."""
    strings = {name: row[name] for name in LISTS if is_json_list(row.get(name))}
    if not strings:
        return row
    parsed = dict(row)
    for name, text in strings.items():
        try:
            parsed[name] = parse_json(text)
        except ValueError:
            continue  # some row's fault, which its reader names
    return parsed
