"""Rows out of files, each with the line it came from."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptoss_ft.data.strict_json import parse_json
from gptoss_ft.errors import UserError


def read_rows(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield `(line, row)` of a JSONL file, lines counted from 1; blank lines are skipped.

    Raises:
        UserError: naming file and line, if the file is missing or holds no row, or a line is not a JSON object
            that `parse_json` can read.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the path of a JSONL file with one row a line")
    is_empty = True
    with path.open("rb") as file:
        for line, content in enumerate(file, start=1):
            if content.strip():
                is_empty = False
                yield line, _parse(content, f"{path}:{line}")
    if is_empty:
        raise UserError(f"{path}: the file is empty; a JSONL file holds one JSON object a line")


def _parse(content: bytes, where: str) -> dict[str, Any]:
    try:
        # A byte order mark is allowed, as editors on Windows write one.
        row = parse_json(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start + 1} is not UTF-8; save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: not JSON ({error.msg} at column {error.colno}); JSONL has one whole JSON object a line"
        ) from error
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row must be a JSON object, not {type(row).__name__}")
    return row
