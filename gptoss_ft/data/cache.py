"""Compiled samples kept between runs, under a name that changes with the rows, the settings and our own code."""

import hashlib
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from filelock import FileLock, Timeout

from gptoss_ft.data.dataset import CompiledSamples
from gptoss_ft.data.files import expand, kind_of
from gptoss_ft.data.skipped import SkippedRows
from gptoss_ft.errors import UserError
from gptoss_ft.files import is_abandoned, naming_a_bad_place, partial_of

CODE = ("data", "harmony")
SUFFIX = ".arrow"
OURS = re.compile(r"[0-9a-f]{32}\.(arrow|lock)|\.[0-9a-f]{32}\.arrow\.partial-.*")
KEPT_DAYS = 30  # since they were last used
Compile = Callable[[Path | None], CompiledSamples]


def default_folder() -> Path:
    """Where compiled samples are kept unless a folder is named."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "gptoss-ft" / "samples"


def cached(
    folder: str | Path,
    paths: Sequence[str | Path],
    settings: object,
    compile: Compile,
    *,
    skipped: SkippedRows | None = None,
    announce: Callable[[str], object] = lambda text: None,
) -> CompiledSamples:
    """What `compile` gives for these rows and settings: read from `folder` if it is there, else kept there.

    One process compiles while others that want the same wait for it. Not kept are rows of hub data sets, which can
    change unseen; those of which some were skipped, which are reported each time; and those of files that changed
    meanwhile.

    Args:
        settings: all that the result depends on besides the files' content, with a `repr` that says so.
        compile: writes to a file that it is given, or to one of its own.
        skipped: what `compile` leaves out.
        announce: is told if samples of an earlier run are used.

    Raises:
        UserError: as `compile` does, and if the folder cannot be written.
    """
    found = expand(paths)
    if any(kind_of(file) == "hub" for file in found):
        return compile(None)
    folder = Path(folder)
    with naming_a_bad_place(folder):
        folder.mkdir(parents=True, exist_ok=True)
    # Before the content is read: reading it and waiting for another process take a while.
    before = _stamps(found)
    file = folder / f"{_key(found, settings)}{SUFFIX}"
    with _locked(file, announce):
        kept = _opened(file)
        if kept is not None:
            announce(f"samples compiled before are used{_used_now(file)}: {file}; data.cache=false compiles them anew")
            return kept
        remove_unused(folder)
        partial = partial_of(file)
        try:
            compiled = compile(partial)
            if _stamps(found) == before and not (skipped and skipped.count):
                partial.replace(file)
            return compiled
        finally:
            partial.unlink(missing_ok=True)


def remove_unused(folder: Path, *, days: float = KEPT_DAYS) -> int:
    """Remove samples that were not used for some days, and what interrupted runs left; returns the bytes freed.

    What a run is writing now stays.
    """
    freed = 0
    if not folder.is_dir():
        return freed
    for file in folder.iterdir():
        if not OURS.fullmatch(file.name):
            continue
        try:
            status = file.stat()
            if ".partial-" in file.name:
                # Half a file that has not grown for a day is nobody's, on whichever machine it was begun.
                limit = 0.0 if is_abandoned(file) else 1.0
            else:
                limit = days if file.suffix == SUFFIX else min(days, 1)
            if time.time() - status.st_mtime >= limit * 24 * 3600:
                file.unlink()
                freed += status.st_size
        except FileNotFoundError:
            continue  # another process was faster
    return freed


def writable_folder(folder: str | None) -> Path:
    """The folder to use: the named one, else the user's cache, else, where that cannot be written, a temporary one."""
    if folder is not None:
        return Path(folder)
    try:
        chosen = default_folder()
        chosen.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=chosen):
            return chosen
    except (OSError, RuntimeError):  # the latter of a user without a home
        return Path(tempfile.gettempdir()) / f"gptoss-ft-samples-{os.getuid()}"


@contextmanager
def _locked(file: Path, announce: Callable[[str], object]) -> Iterator[None]:
    lock = FileLock(file.with_suffix(".lock"))
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            announce("another process is compiling these rows; waiting for it")
            lock.acquire()
    except OSError as error:
        raise UserError(f"{file.parent} cannot be locked ({error}): set data.cache=false or data.cache_dir") from error
    try:
        yield
    finally:
        lock.release()


def _opened(file: Path) -> CompiledSamples | None:
    """What is kept there; None if nothing is, or if it is damaged."""
    try:
        return CompiledSamples.open(file)
    except (OSError, ValueError, KeyError, TypeError):  # ArrowInvalid is a ValueError
        return None


def _used_now(file: Path) -> str:
    """Note that a file is in use; returns when it last was, for a message."""
    try:
        before = file.stat().st_mtime
        os.utime(file)
    except OSError:
        return ""  # removed meanwhile, or another user's: it has been opened, and that is enough
    return f" (last on {time.strftime('%Y-%m-%d %H:%M', time.localtime(before))})"


def _stamps(found: Iterable[str]) -> list[tuple[int, int]]:
    """What changes when a file does."""
    return [(status.st_size, status.st_mtime_ns) for path in found for status in map(os.stat, _files(path))]


def _key(found: Sequence[str], settings: object) -> str:
    digest = hashlib.blake2b(repr(settings).encode(), digest_size=16)
    for package in CODE:
        for source in sorted(_sources(files("gptoss_ft") / package), key=lambda source: source.name):
            digest.update(source.read_bytes())
    for path in found:
        digest.update(f"\n{path}\n".encode())
        for file in _files(path):
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "blake2b").digest())
    return digest.hexdigest()


def _sources(folder: Traversable) -> Iterable[Traversable]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _sources(entry)
        elif entry.name.endswith(".py"):
            yield entry


def _files(path: str) -> list[Path]:
    """A file, or the files of a `datasets` folder."""
    return sorted(file for file in Path(path).rglob("*") if file.is_file()) if os.path.isdir(path) else [Path(path)]
