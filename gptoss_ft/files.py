"""Files and folders that appear under their final name only when they are whole."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gptoss_ft.errors import UserError

GB = 1e9


@contextmanager
def whole_folder(path: Path | str, *, num_bytes: int = 0) -> Iterator[Path]:
    """Yield a folder to fill; it is renamed to `path` when the block succeeds and removed when it fails.

    Args:
        num_bytes: roughly how much will be written; refused at once if the disk has less.

    Raises:
        UserError: if `path` exists already or the disk is (or becomes) full.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists already: choose another output folder or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if num_bytes > free:
        raise UserError(
            f"{path} needs {num_bytes / GB:.1f} GB but only {free / GB:.1f} GB are free on its disk: "
            "free some room or choose another folder"
        )
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        with naming_a_full_disk(path):
            yield partial
            if path.exists():
                path.rmdir()
            partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_whole(path: Path | str, text: str) -> None:
    """Write `text` to `path` through a temporary neighbour, so that readers never see half of it."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with naming_a_full_disk(path):
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def naming_a_full_disk(path: Path) -> Iterator[None]:
    """Turn "no space left on device" into an error that names the output and the cure."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"the disk filled up while writing {path}: free some room and run again") from error
