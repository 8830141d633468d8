"""Rows of CSV files, Parquet files and `datasets` tables.

A table has a value for every column of every row, so a null stands for "absent" in it; nulls are dropped at any depth.
"""

import csv
import io
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from gptoss_ft.errors import RestUnreadableError, UserError

BATCH_ROWS = 64
HUB = "hf://"


def csv_rows(file: BinaryIO, max_bytes: int) -> Iterator[tuple[int, Mapping[str, Any] | UserError]]:
    """Yield each row's last line and its cells by the header's names; an empty cell is absent."""
    csv.field_size_limit(max_bytes)
    # A byte that is not UTF-8 becomes half a surrogate pair, which the row's reader names with its field.
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    rows = csv.reader(text)
    header = next(rows, None)
    if header is None:
        return
    if twice := sorted({name for name in header if header.count(name) > 1}):
        yield 1, RestUnreadableError(f"several columns are called {twice}; rename them")
        return
    while True:
        try:
            cells = next(rows, None)
        except csv.Error as error:
            yield rows.line_num, RestUnreadableError(f"not CSV ({error}); check the quotes from here on")
            return
        if cells is None:
            return
        if not cells:
            continue
        if len(cells) != len(header):
            yield rows.line_num, UserError(f"the row has {len(cells)} cells and the header {len(header)}; quote commas")
        else:
            yield rows.line_num, {name: cell for name, cell in zip(header, cells, strict=True) if cell}


def parquet_rows(path: str) -> Iterator[Mapping[str, Any]]:
    """Every row of a Parquet file.

    Raises:
        UserError: naming the file, if it is not Parquet.
    """
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=BATCH_ROWS):
                yield from _without_nulls(batch.to_pylist())
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as Parquet ({error}); fetch or write it again") from error


def dataset_rows(path: str) -> Iterator[Mapping[str, Any]]:
    """Every row of a folder that `datasets` saved; of several splits, the one called train.

    Raises:
        UserError: naming the folder, if it has splits but no train.
    """
    import datasets

    table = datasets.load_from_disk(path)
    if isinstance(table, datasets.DatasetDict):
        if "train" not in table:
            raise UserError(f"{path}: has no split `train`; name one of its folders: {', '.join(table)}")
        table = table["train"]
    for batch in table.with_format("arrow").iter(batch_size=BATCH_ROWS):
        yield from _without_nulls(batch.to_pylist())


def hub_rows(path: str) -> Iterator[Mapping[str, Any]]:
    """Every row of `hf://owner/name[/config][:split]`, fetched as it is read.

    Raises:
        UserError: naming the data set, if it cannot be found or reached.
    """
    import datasets

    name, _, split = path.removeprefix(HUB).removeprefix("datasets/").partition(":")
    owner, _, rest = name.partition("/")
    repository, _, config = rest.partition("/")
    if not repository:
        raise UserError(f"{path}: a hub data set is named {HUB}owner/name, with /config and :split where needed")
    try:
        table = datasets.load_dataset(f"{owner}/{repository}", config or None, split=split or "train", streaming=True)
        yield from _without_nulls(table)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: cannot be read from the hub ({reason}); check name, split and network") from error


def _without_nulls(rows: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    for row in rows:
        yield _dropped(row)


def _dropped(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _dropped(member) for name, member in value.items() if member is not None}
    return [_dropped(item) for item in value] if isinstance(value, list) else value
