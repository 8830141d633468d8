"""Rows out of files of every kind, one after the other, each with the line it came from.

JSON text is handed on as bytes, so that it can be parsed by another process; a row that cannot be told from its
neighbours is handed on as the error that it is, and reading goes on behind it.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from gptoss_ft.data.files import expand, kind_of, opened
from gptoss_ft.data.json_file import json_objects
from gptoss_ft.data.strict_json import parse_json
from gptoss_ft.data.tables import csv_rows, dataset_rows, hub_rows, parquet_rows
from gptoss_ft.errors import UserError

# A row of the longest context that gpt-oss has is below 1 MB; a file without line breaks must not fill the memory.
MAX_ROW_BYTES = 16 * 2**20


@dataclass(frozen=True)
class RawRow:
    """A row's line (its number, in files without lines) and its JSON bytes, its value, or why it has neither.

    `number` counts the file's rows from 1; it is there if the row before begins on the same line.
    """

    line: int
    content: bytes | Mapping[str, Any] | UserError
    number: int | None = None

    @property
    def place(self) -> str:
        """Where in the file it is, for people."""
        return str(self.line) if self.number is None else f"{self.line} (row {self.number})"


def raw_rows(path: str | Path) -> Iterator[RawRow]:
    """Every row of a file or data set, lines counted from 1; blank lines are skipped.

    Raises:
        UserError: naming the file, if it is missing, damaged or holds no row.
    """
    (path,) = expand([path])
    number = previous = 0
    for number, (line, content) in enumerate(_rows(path), start=1):
        yield RawRow(line, content, number if line == previous else None)
        previous = line
    if not number:
        raise UserError(f"{path}: the file is empty; a JSONL file holds one JSON object a line")


def parse_row(content: bytes | Mapping[str, Any] | UserError) -> Mapping[str, Any]:
    """The row's value.

    Raises:
        UserError: if it is not a JSON object that `parse_json` can read; callers say where.
    """
    if isinstance(content, UserError):
        raise content
    if not isinstance(content, bytes):
        return content
    try:
        # A byte order mark is allowed, as editors on Windows write one.
        row = parse_json(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"byte {error.start + 1} is not UTF-8; save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"not JSON ({error.msg} at column {error.colno}); JSONL has one whole JSON object a line"
        ) from error
    if not isinstance(row, dict):
        raise UserError(f"a row must be a JSON object, not {type(row).__name__}")
    return row


def read_rows(path: str | Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield `(line, row)`.

    Raises:
        UserError: naming file and line, if a row cannot be read; and as `raw_rows` does.
    """
    for row in raw_rows(path):
        try:
            yield row.line, parse_row(row.content)
        except UserError as error:
            raise UserError(f"{path}:{row.place}: {error}") from error


def first_rows(path: str | Path, count: int) -> list[tuple[int, Mapping[str, Any]]]:
    """The readable ones among the first `count` rows, to tell the format by."""
    found = []
    for row in islice(raw_rows(path), count):
        try:
            found.append((row.line, parse_row(row.content)))
        except UserError:
            continue  # named when the row is read for good
    return found


def _rows(path: str) -> Iterator[tuple[int, bytes | Mapping[str, Any] | UserError]]:
    kind = kind_of(path)
    if kind == "hub":
        yield from enumerate(hub_rows(path), start=1)
    elif kind == "dataset":
        yield from enumerate(dataset_rows(path), start=1)
    elif kind == "parquet":
        yield from enumerate(parquet_rows(path), start=1)
    else:
        with opened(path) as file:
            if kind == "csv":
                yield from csv_rows(file, MAX_ROW_BYTES)
            elif kind == "json":
                yield from json_objects(file, MAX_ROW_BYTES)
            else:
                yield from _lines(file)


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes | UserError]]:
    line = 0
    while content := file.readline(MAX_ROW_BYTES + 1):
        line += 1
        if len(content) > MAX_ROW_BYTES and not content.endswith(b"\n"):
            num_bytes = len(content)
            while content and not content.endswith(b"\n"):
                content = file.readline(MAX_ROW_BYTES)
                num_bytes += len(content)
            yield line, too_long(num_bytes)
        elif content.strip():
            yield line, content


def too_long(num_bytes: int) -> UserError:
    return UserError(
        f"the row has {num_bytes / 2**20:.0f} MiB, more than the {MAX_ROW_BYTES // 2**20} that are read; "
        "split it, one row a line"
    )
