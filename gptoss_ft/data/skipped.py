"""The rows that `on_error=skip` leaves out: counted, reported and written aside."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from gptoss_ft.data.schemas.fields import FieldError
from gptoss_ft.data.source import RawRow
from gptoss_ft.errors import UserError
from gptoss_ft.files import naming_a_bad_place, naming_a_full_disk, partial_of

SHOWN = 5


class SkippedRows:
    """Collects skipped rows; with a path, each goes to that JSONL file with its place, field, error and content.

    The file appears when the block ends, and only if a row was skipped.
    """

    def __init__(self, path: Path | str | None = None):
        self.path = Path(path) if path else None
        self.count = 0
        self.by_field: Counter[str] = Counter()
        self.first: list[str] = []
        self._file: IO[str] | None = None

    def add(self, file: str, row: RawRow, error: UserError) -> None:
        field = error.field if isinstance(error, FieldError) else ""
        self.count += 1
        self.by_field[without_indices(field) or "row"] += 1
        if len(self.first) < SHOWN:
            self.first.append(f"{file}:{row.place}: {error}")
        if self.path:
            place = {"file": file, "line": row.line} | ({"number": row.number} if row.number else {})
            record = place | {"field": field, "error": str(error), "row": _as_json(row.content)}
            with naming_a_bad_place(self.path), naming_a_full_disk(self.path):
                if self._file is None:
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                    self._file = partial_of(self.path).open("w", encoding="utf-8", errors="backslashreplace")
                self._file.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")

    def __enter__(self) -> "SkippedRows":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not (self._file and self.path):
            return
        self._file.close()
        self._file = None
        # Too many skipped rows are an error too, and then the file is what mends them.
        if kind is None or issubclass(kind, UserError):
            with naming_a_bad_place(self.path):
                partial_of(self.path).replace(self.path)
        else:
            partial_of(self.path).unlink()

    def __str__(self) -> str:
        fields = ", ".join(f"{field} ({count})" for field, count in self.by_field.most_common())
        where = f"; they are in {self.path}" if self.path and self.count else ""
        return "\n".join(
            [f"skipped {self.count} rows, by field: {fields}{where}", *(f"  {line}" for line in self.first)]
        )


def without_indices(field: str) -> str:
    """`messages[3].content` as `messages[].content`, so that equal faults of different rows fall together."""
    return "[".join(part.lstrip("0123456789") if number else part for number, part in enumerate(field.split("[")))


def _as_json(content: object) -> Any:
    if isinstance(content, bytes):
        return content.decode(errors="backslashreplace")
    return content if isinstance(content, Mapping) else None
