"""Files and folders that appear under their final name only when they are whole."""

import errno
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import psutil

from gptoss_ft.errors import UserError

GB = 1e9


@contextmanager
def whole_folder(path: Path | str, *, num_bytes: int = 0) -> Iterator[Path]:
    """Yield a folder to fill; it is renamed to `path` when the block succeeds and removed when it fails.

    What killed processes left of the same folder is removed first.

    Args:
        num_bytes: roughly how much will be written; refused at once if the disk has less.

    Raises:
        UserError: if `path` exists already or cannot be written, if another process of this machine is writing it, or
            the disk is (or becomes) full or takes no files of that size.
    """
    path = Path(path)
    with naming_a_bad_place(path):
        refuse_existing(path)
        if path.name in ("", "..") or os.path.ismount(path):
            raise UserError(f"{path} cannot be replaced by a new folder: choose a folder inside it")
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(path)
        free = shutil.disk_usage(path.parent).free
        if num_bytes > free:
            raise UserError(
                f"{path} needs {num_bytes / GB:.1f} GB but only {free / GB:.1f} GB are free on its disk: "
                "free some room or choose another folder"
            )
        partial = partial_of(path)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    try:
        # After ours is there: of two that start together, both may give way, but never none.
        refuse_other_writers(path)
        with naming_a_full_disk(path):
            yield partial
            refuse_existing(path)
            if path.exists():
                path.rmdir()
            partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_existing(path: Path) -> None:
    """Raise `UserError` if `path` exists and is no empty folder."""
    if os.path.lexists(path) and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists already: choose another output folder or remove it")


def write_whole(path: Path | str, text: str) -> None:
    """Write `text` to `path` through a temporary neighbour, so that readers never see half of it.

    Raises:
        UserError: if the file cannot be written there, or the disk is full.
    """
    with whole_file(path) as file:
        file.write(text)


@contextmanager
def whole_file(path: Path | str) -> Iterator[TextIO]:
    """Yield a text file to fill; it is renamed to `path` when the block succeeds and removed when it fails.

    Raises:
        UserError: if the file cannot be written there, or the disk is full.
    """
    path = Path(path)
    partial = partial_of(path)
    try:
        with naming_a_bad_place(path):
            file = partial.open("w", encoding="utf-8")
        with naming_a_full_disk(path), file:
            yield file
        with naming_a_bad_place(path), naming_a_full_disk(path):
            partial.replace(path)
    finally:
        if os.path.lexists(partial):
            partial.unlink()


def check_writable_parent(path: Path | str) -> None:
    """Raise `UserError` unless the folder `path` could be made, or written to if it is there; leaves nothing behind."""
    path = Path(path)
    with naming_a_bad_place(path):
        there = next(folder for folder in (path, *path.parents) if os.path.lexists(folder))
        # Permission bits do not tell: root passes them all, also in /proc and on a disk mounted read-only.
        with tempfile.TemporaryDirectory(prefix=".gptoss-ft-", dir=there) as probe:
            Path(probe, path.relative_to(there)).mkdir(parents=True, exist_ok=True)


def partial_of(path: Path) -> Path:
    """Where this process keeps `path` until it is whole."""
    return path.with_name(f"{_partial_prefix(path)}{os.getpid()}")


def remove_abandoned(path: Path) -> None:
    """Remove the partial folders of `path` whose process has ended."""
    for folder in _partials(path):
        if is_abandoned(folder):
            shutil.rmtree(folder, ignore_errors=True)


def refuse_other_writers(path: Path) -> None:
    """Raise `UserError`, naming the process, if another one of this machine is filling a partial folder of `path`."""
    for folder in _partials(path):
        if folder != partial_of(path) and not is_abandoned(folder):
            raise UserError(
                f"{path} is being written by process {folder.name.rpartition('-')[2]} (in {folder}): wait until it has "
                "ended, or choose another output folder"
            )


def is_abandoned(partial: Path) -> bool:
    """Whether the process of this machine that kept something in `partial` has ended."""
    machine, _, process = partial.name.rpartition("-")
    if not machine.endswith(f".partial-{platform.node()}") or not process.isdecimal():
        return False
    try:
        # One that started after the last change has only got the number of the one that made it.
        return psutil.Process(int(process)).create_time() > partial.stat().st_mtime
    except (psutil.NoSuchProcess, FileNotFoundError):
        return True


def _partials(path: Path) -> list[Path]:
    if not path.parent.is_dir():
        return []
    # Nothing but a process follows: of two machines the name of one may begin with the other's.
    kept = re.compile(re.escape(_partial_prefix(path)) + r"\d+")
    return [folder for folder in path.parent.iterdir() if kept.fullmatch(folder.name)]


def _partial_prefix(path: Path) -> str:
    # With the machine: on a shared disk, a process that is not found here may be running on another.
    return f".{path.name}.partial-{platform.node()}-"


@contextmanager
def naming_a_bad_place(path: Path) -> Iterator[None]:
    """Turn a system error while `path` is created into one that names it and the cure."""
    try:
        yield
    except OSError as error:
        file = next((place for place in (path, *path.parents) if os.path.isfile(place)), None)
        reason = f"{file} is a file" if file else (error.strerror or str(error)).lower()
        raise UserError(f"{path} cannot be written ({reason}): choose another place") from error


@contextmanager
def naming_a_full_disk(path: Path) -> Iterator[None]:
    """Turn "no space left on device" and "file too large" into errors that name the output and the cure."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise UserError(
                f"{path} is to hold a larger file than its disk or `ulimit -f` allows: choose a disk whose file system "
                "takes it (FAT32 ends at 4 GB), or raise the limit, and run again"
            ) from error
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"the disk filled up while writing {path}: free some room and run again") from error
