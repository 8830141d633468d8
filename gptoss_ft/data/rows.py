"""Rows of any file and format through one function: faults named or skipped, order kept, all cores used."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Generic, Literal, TypeVar

from tqdm.auto import tqdm

from gptoss_ft.data.detect import AUTO, Detection, detect
from gptoss_ft.data.files import expand
from gptoss_ft.data.schemas.chat import DEFAULTS
from gptoss_ft.data.schemas.registry import READERS
from gptoss_ft.data.skipped import SkippedRows
from gptoss_ft.data.source import RawRow, first_rows, parse_row, raw_rows, read_rows
from gptoss_ft.errors import ConfigError, RestUnreadableError, UserError
from gptoss_ft.harmony.conversation import Conversation

OnError = Literal["stop", "skip"]
Result = TypeVar("Result")

SAMPLED_ROWS = 100  # that a format is told by
CHUNK_ROWS = 128
# A process takes 3 s to start (imports and vocabulary), in which one core reads some 10 MB of rows.
PARALLEL_BYTES = 32 * 2**20


@dataclass(frozen=True)
class RowSettings:
    """How rows are read.

    `defaults` gives what a row does not state. With `on_error="skip"` a row that cannot be used is left out, up to a
    share of `max_skipped` of all rows. `num_processes` 0 takes every core where there is enough to read.
    """

    format: str = AUTO
    defaults: Conversation = DEFAULTS
    on_error: OnError = "stop"
    max_skipped: float = 0.05
    num_processes: int = 1


DEFAULT_SETTINGS = RowSettings()


@dataclass(frozen=True)
class Row(Generic[Result]):
    """What the function made of a row, and where the row is; `place` is as `RawRow` has it."""

    file: str
    line: int
    place: str
    format: str
    result: Result

    @property
    def where(self) -> str:
        return f"{self.file}:{self.place}"


def map_rows(
    paths: Sequence[str | Path],
    function: Callable[[Conversation], Result],
    settings: RowSettings = DEFAULT_SETTINGS,
    *,
    skipped: SkippedRows | None = None,
    announce: Callable[[str], object] = lambda text: None,
    needs_answers: bool = True,
    progress: bool = False,
) -> Iterator[Row[Result]]:
    """Yield what `function` makes of every row's conversation, in the order of the files.

    Args:
        function: picklable, and may raise `UserError` for a row that cannot be used after all.
        skipped: takes what is left out.
        announce: is told each file's format and why it was chosen.
        needs_answers: refuse formats that hold prompts only.

    Raises:
        UserError: naming file, line, field and cure, if a row cannot be used; if more than `max_skipped` cannot; if
            the rest of a file cannot be read, in any case.
        ConfigError: if the format is unknown.
    """
    skipped = SkippedRows() if skipped is None else skipped
    files = expand(paths)
    num_rows = num_skipped = 0
    with _Workers(settings.num_processes or _num_cores(files)) as workers:
        for file in files:
            detection = _format_of(file, settings.format, needs_answers)
            announce(f"{file}: {detection}")
            work = partial(_read_chunk, detection.format, settings.defaults, function)
            with tqdm(desc=f"reading {Path(file).name}", unit=" rows", disable=not progress) as bar:
                for row, outcome in workers.run(work, raw_rows(file)):
                    num_rows += 1
                    bar.update()
                    if not isinstance(outcome, _Fault):
                        yield Row(file, row.line, row.place, detection.format, outcome)
                    elif settings.on_error == "stop":
                        raise UserError(f"{file}:{row.place}: {outcome.error}") from outcome.error
                    elif isinstance(outcome.error, RestUnreadableError):
                        raise UserError(
                            f"{file}:{row.place}: {outcome.error}; the rows behind it cannot be told apart, so that "
                            "it cannot be skipped alone"
                        ) from outcome.error
                    else:
                        num_skipped += 1
                        skipped.add(file, row, outcome.error)
    if num_skipped > settings.max_skipped * num_rows:
        raise UserError(
            f"{num_skipped} of {num_rows} rows cannot be used, more than the {settings.max_skipped:.0%} that may be "
            f"skipped: mend them or raise data.max_skipped; the first is {skipped.first[0]}"
            + (f"; all are in {skipped.path}" if skipped.path else "")
        )


@dataclass(frozen=True)
class _Fault:
    error: UserError


def _format_of(file: str, format: str, needs_answers: bool) -> Detection:
    if format == AUTO:
        rows = first_rows(file, SAMPLED_ROWS)
        if not rows:
            next(read_rows(file))  # raises what is wrong with the first one
        try:
            detection = detect(rows)
        except UserError as error:
            raise UserError(f"{file}: {error}") from error
    elif format in READERS:
        detection = Detection(format, "data.format names it")
    else:
        raise ConfigError(f"data.format: {format!r} is not known; use one of {AUTO}, {', '.join(READERS)}")
    if needs_answers and not READERS[detection.format].has_answers:
        raise UserError(
            f"{file}: {detection}; supervised fine-tuning learns from answers: add an assistant message to each row"
        )
    return detection


def _read_chunk(
    format: str,
    defaults: Conversation,
    function: Callable[[Conversation], Result],
    rows: Sequence[RawRow],
) -> list[Result | _Fault]:
    return [_read_row(row, format, defaults, function) for row in rows]


def _read_row(
    row: RawRow, format: str, defaults: Conversation, function: Callable[[Conversation], Result]
) -> Result | _Fault:
    try:
        return function(READERS[format].read(parse_row(row.content), defaults=defaults))
    except UserError as error:
        return _Fault(error)
    except RecursionError:
        return _Fault(UserError("lists and objects are nested too deeply; flatten them"))


class _Workers:
    """Processes that share the chunks of a file, or this one alone."""

    def __init__(self, num_processes: int):
        self._num_processes = num_processes
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "_Workers":
        if self._num_processes > 1:
            # Torch has started threads, and a fork copies their locks without them.
            self._pool = ProcessPoolExecutor(self._num_processes, mp_context=get_context("spawn"))
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def run(
        self, work: Callable[[Sequence[RawRow]], list[Result | _Fault]], rows: Iterable[RawRow]
    ) -> Iterator[tuple[RawRow, Result | _Fault]]:
        """Rows with their outcomes, in order; no more chunks are held than keep the processes busy."""
        rows_left = iter(rows)
        chunks = iter(lambda: list(islice(rows_left, CHUNK_ROWS if self._pool else 1)), [])
        if self._pool is None:
            for chunk in chunks:
                yield from zip(chunk, work(chunk), strict=True)
            return
        running: deque[tuple[list[RawRow], Future[list[Result | _Fault]]]] = deque()
        try:
            for chunk in chunks:
                running.append((chunk, self._pool.submit(work, chunk)))
                if len(running) > 2 * self._num_processes:
                    oldest, future = running.popleft()
                    yield from zip(oldest, future.result(), strict=True)
            for chunk, future in running:
                yield from zip(chunk, future.result(), strict=True)
        except BrokenProcessPool as error:
            raise UserError(
                "a process that reads rows was ended from outside, most likely for want of memory: "
                "set data.num_processes=1"
            ) from error


def _num_cores(files: Sequence[str]) -> int:
    num_bytes = sum(os.path.getsize(file) for file in files if os.path.isfile(file))
    return len(os.sched_getaffinity(0)) if num_bytes > PARALLEL_BYTES else 1
