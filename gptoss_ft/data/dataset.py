"""Rows to token samples: one sample per generation, every drop counted."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
from numpy.typing import NDArray

from gptoss_ft.data.rows import DEFAULT_SETTINGS, RowSettings, map_rows
from gptoss_ft.data.sample_table import SampleTable, SampleWriter
from gptoss_ft.data.skipped import SkippedRows
from gptoss_ft.errors import UserError
from gptoss_ft.harmony.conversation import Conversation
from gptoss_ft.harmony.generations import DEFAULT_RULES, generations
from gptoss_ft.harmony.weights import LossRules


@dataclass(frozen=True)
class CompiledSamples:
    """The kept samples, and counts: of the kept samples' tokens, of all rows and generations, of every drop."""

    samples: SampleTable
    rows: int
    rows_without_thinking: int
    generations: int
    dropped_too_long: int
    dropped_without_loss: int
    tokens: int
    loss_tokens: int

    @classmethod
    def open(cls, path: Path) -> "CompiledSamples":
        """What `compile_samples` wrote to this file.

        Raises:
            pyarrow.ArrowInvalid, OSError: if it is not whole, or not there.
        """
        samples = SampleTable(path)
        return cls(samples, **samples.facts)

    def __str__(self) -> str:
        return (
            f"{self.rows} rows ({self.rows_without_thinking} without thinking), {self.generations} generations; "
            f"dropped {self.dropped_too_long} as too long and {self.dropped_without_loss} without loss; "
            f"kept {len(self.samples)} samples of {self.tokens} tokens, {self.loss_tokens} of them with loss"
        )


def compile_samples(
    paths: Sequence[str | Path],
    *,
    rows: RowSettings = DEFAULT_SETTINGS,
    rules: LossRules = DEFAULT_RULES,
    max_length: int,
    out: Path | None = None,
    skipped: SkippedRows | None = None,
    announce: Callable[[str], object] = lambda text: None,
    progress: bool = False,
) -> CompiledSamples:
    """Compile every row of the files.

    A sample over `max_length` tokens is dropped, never cut: a cut one would not teach the model to stop.

    Args:
        rows: how they are read; `skipped` and `announce` are as `map_rows` takes them.
        rules: what has loss.
        out: the file that samples are written to; None makes one in the folder for temporary files, which goes when
            the samples do.

    Raises:
        UserError: naming file and line, if a row cannot be used; or if no sample is left.
        ConfigError: if the format is unknown.
    """
    if out is None:
        with tempfile.TemporaryDirectory(prefix="gptoss-ft-") as folder:
            # A file in use keeps its content when it is removed.
            return compile_samples(
                paths,
                rows=rows,
                rules=rules,
                max_length=max_length,
                out=Path(folder, "samples.arrow"),
                skipped=skipped,
                announce=announce,
                progress=progress,
            )
    counts = dict.fromkeys(list(CompiledSamples.__dataclass_fields__)[1:], 0)
    shortest = 0
    compile_row = partial(_compile_row, rules=rules)
    with SampleWriter(out) as writer:
        for row in map_rows(paths, compile_row, rows, skipped=skipped, announce=announce, progress=progress):
            counts["rows"] += 1
            counts["rows_without_thinking"] += not row.result.has_thinking
            for generation, (ids, weights) in enumerate(row.result.samples):
                counts["generations"] += 1
                num_loss_tokens = int(np.count_nonzero(weights))
                if not num_loss_tokens:
                    counts["dropped_without_loss"] += 1
                elif len(ids) > max_length:
                    counts["dropped_too_long"] += 1
                    shortest = min(shortest or len(ids), len(ids))
                else:
                    counts["tokens"] += len(ids)
                    counts["loss_tokens"] += num_loss_tokens
                    writer.add(ids, weights, row=counts["rows"], file=row.file, line=row.line, generation=generation)
        if not counts["tokens"]:
            raise UserError(
                f"no sample is left of {counts['rows']} rows in {', '.join(map(str, paths))}: "
                f"{counts['dropped_too_long']} longer than {max_length} tokens (the shortest has {shortest}), "
                f"{counts['dropped_without_loss']} with no loss on any token; raise data.max_length or choose other "
                "rows"
            )
        writer.facts = counts
    return CompiledSamples.open(out)


def split_rows(samples: SampleTable, eval_fraction: float, seed: int) -> tuple[SampleTable, SampleTable]:
    """Training and evaluation samples. A row's generations share text, so they all go to one side.

    Raises:
        UserError: if an evaluation set is asked for and there are fewer than two rows.
    """
    if eval_fraction == 0:
        return samples, samples[:0]
    rows = np.unique(samples.row_numbers)
    if len(rows) < 2:
        raise UserError("an evaluation split needs at least two rows; give more rows or set data.eval_fraction=0")
    num_eval = min(max(1, round(eval_fraction * len(rows))), len(rows) - 1)
    drawn = Random(seed).sample(range(len(rows)), num_eval)
    is_held_out = np.isin(samples.row_numbers, rows[drawn])
    return samples.take(~is_held_out), samples.take(is_held_out)


@dataclass(frozen=True)
class _CompiledRow:
    """Samples as arrays, since lists take many times as long from one process to another."""

    samples: list[tuple[NDArray[np.int32], NDArray[np.float32]]]
    has_thinking: bool


def _compile_row(conversation: Conversation, rules: LossRules) -> _CompiledRow:
    samples = []
    for generation in generations(conversation, rules):
        ids = np.array(generation.prompt_ids + generation.completion_ids, np.int32)
        weights = np.zeros(len(ids), np.float32)
        weights[len(generation.prompt_ids) :] = generation.loss_weights
        samples.append((ids, weights))
    return _CompiledRow(samples, any(message.is_reasoning for message in conversation.messages))
