"""What `data.path` may name: files, globs, folders and hub data sets; and the bytes of compressed files."""

import glob
import gzip
import io
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal, cast

import pyarrow as pa

from gptoss_ft.errors import UserError

HUB = "hf://"
Kind = Literal["jsonl", "json", "parquet", "csv", "dataset", "hub"]
KINDS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
}
COMPRESSIONS = (".gz", ".zst")


def expand(paths: Iterable[str | Path]) -> list[str]:
    """The files and data sets that paths name, in order: a glob's and a folder's files sorted by name.

    Raises:
        UserError: naming the path, if nothing is there.
    """
    return [found for path in paths for found in _expand(str(path))]


def absolute(path: str) -> str:
    """The path as it means the same from any working directory."""
    return path if path.startswith(HUB) else os.path.abspath(path)


def kind_of(path: str) -> Kind:
    """How a file is read, by its ending; one that is not known counts as JSONL."""
    if path.startswith(HUB):
        return "hub"
    if is_dataset_folder(path):
        return "dataset"
    suffixes = [suffix for suffix in Path(path).suffixes if suffix not in COMPRESSIONS]
    return KINDS.get(suffixes[-1], "jsonl") if suffixes else "jsonl"


def is_dataset_folder(path: str | Path) -> bool:
    """Whether `datasets` saved a table, or several splits of one, in this folder."""
    return any(os.path.isfile(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json"))


@contextmanager
def opened(path: str) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed as they are read.

    Raises:
        UserError: naming the file, if it cannot be read or its compression is damaged.
    """
    try:
        with _open(path) as file:
            yield file
    except (EOFError, gzip.BadGzipFile, zlib.error, pa.ArrowException) as error:
        raise UserError(f"{path}: the compressed file is damaged ({error}); fetch or compress it again") from error
    except OSError as error:
        # pyarrow reports a damaged stream as a plain OSError without a number.
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"{path}: cannot be read ({reason}); check the file") from error


def _open(path: str) -> BinaryIO:
    if path.endswith(".gz"):
        return cast(BinaryIO, gzip.open(path, "rb"))
    if path.endswith(".zst"):
        # pyarrow, which `datasets` brings, knows zstd; Python does from 3.14 on.
        return io.BufferedReader(cast(io.RawIOBase, pa.input_stream(path, compression="zstd")))
    return open(path, "rb")


def _expand(path: str) -> list[str]:
    if path.startswith(HUB) or os.path.isfile(path) or is_dataset_folder(path):
        return [path]
    if os.path.isdir(path):
        found = sorted(str(file) for file in Path(path).iterdir() if file.is_file() and _has_known_ending(file))
        if not found:
            raise UserError(f"{path}: the folder holds no row file; rows are in {', '.join(KINDS)} files")
        return found
    if glob.has_magic(path):
        found = sorted(file for file in glob.glob(path, recursive=True) if os.path.isfile(file))
        if not found:
            raise UserError(f"{path}: no file matches; check the pattern")
        return found
    raise UserError(f"{path}: no such file; give a file, a folder, a pattern such as rows/*.jsonl or {HUB}owner/name")


def _has_known_ending(file: Path) -> bool:
    return any(suffix in KINDS for suffix in file.suffixes)
