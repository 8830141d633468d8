"""Rows to token samples: one sample per generation, every drop counted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

from datasets import Dataset, Features, List, Value

from gptoss_ft.data.rows import DEFAULT_SETTINGS, RowSettings, map_rows
from gptoss_ft.data.skipped import SkippedRows
from gptoss_ft.errors import UserError
from gptoss_ft.harmony.conversation import Conversation
from gptoss_ft.harmony.generations import DEFAULT_RULES, Generation, generations
from gptoss_ft.harmony.weights import LossRules

IGNORED_LABEL = -100  # what torch's cross entropy skips


@dataclass(frozen=True)
class Sample:
    """One generation as tokens, each with the weight of its loss (0: none).

    `row` is `file:line`, `generation` counts from 0 within the row.
    """

    input_ids: list[int]
    loss_weights: list[float]
    row: str
    generation: int

    @property
    def labels(self) -> list[int]:
        """`input_ids` where there is loss, -100 elsewhere."""
        weighted = zip(self.input_ids, self.loss_weights, strict=True)
        return [token if weight else IGNORED_LABEL for token, weight in weighted]

    @property
    def num_loss_tokens(self) -> int:
        return sum(map(bool, self.loss_weights))


@dataclass(frozen=True)
class CompiledSamples:
    """The kept samples, and counts: of the kept samples' tokens, of all rows and generations, of every drop."""

    samples: list[Sample]
    rows: int
    rows_without_thinking: int
    generations: int
    dropped_too_long: int
    dropped_without_loss: int
    tokens: int
    loss_tokens: int

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
    skipped: SkippedRows | None = None,
    announce: Callable[[str], object] = lambda text: None,
    progress: bool = False,
) -> CompiledSamples:
    """Compile every row of the files.

    `rows` is how they are read, `rules` what has loss; `skipped` and `announce` are as `map_rows` takes them.
    A sample over `max_length` tokens is dropped, never cut: a cut one would not teach the model to stop.

    Raises:
        UserError: naming file and line, if a row cannot be used; or if no sample is left.
        ConfigError: if the format is unknown.
    """
    compiled: list[Sample] = []
    num_rows = rows_without_thinking = 0
    compile_row = partial(_compile_row, rules=rules)
    for row in map_rows(paths, compile_row, rows, skipped=skipped, announce=announce, progress=progress):
        compiled += [sample_of(generation, row.where) for generation in row.result.generations]
        num_rows += 1
        rows_without_thinking += not row.result.has_thinking
    with_loss = [sample for sample in compiled if sample.num_loss_tokens]
    kept = [sample for sample in with_loss if len(sample.input_ids) <= max_length]
    result = CompiledSamples(
        samples=kept,
        rows=num_rows,
        rows_without_thinking=rows_without_thinking,
        generations=len(compiled),
        dropped_too_long=len(with_loss) - len(kept),
        dropped_without_loss=len(compiled) - len(with_loss),
        tokens=sum(len(sample.input_ids) for sample in kept),
        loss_tokens=sum(sample.num_loss_tokens for sample in kept),
    )
    if not kept:
        shortest = min((len(sample.input_ids) for sample in with_loss), default=0)
        raise UserError(
            f"no sample is left of {num_rows} rows in {', '.join(map(str, paths))}: {result.dropped_too_long} longer "
            f"than {max_length} tokens (the shortest has {shortest}), {result.dropped_without_loss} with no loss on "
            "any token; raise data.max_length or choose other rows"
        )
    return result


def split_rows(samples: Sequence[Sample], eval_fraction: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Training and evaluation samples. A row's generations share text, so they all go to one side.

    Raises:
        UserError: if an evaluation set is asked for and there are fewer than two rows.
    """
    if eval_fraction == 0:
        return list(samples), []
    rows = list(dict.fromkeys(sample.row for sample in samples))
    if len(rows) < 2:
        raise UserError("an evaluation split needs at least two rows; give more rows or set data.eval_fraction=0")
    num_eval = min(max(1, round(eval_fraction * len(rows))), len(rows) - 1)
    held_out = set(Random(seed).sample(rows, num_eval))
    train = [sample for sample in samples if sample.row not in held_out]
    return train, [sample for sample in samples if sample.row in held_out]


def to_dataset(samples: Sequence[Sample]) -> Dataset:
    """Columns `input_ids` and `labels`, int32 lists, and `loss_weights`, float32 lists."""
    features = Features(
        {
            "input_ids": List(Value("int32")),
            "labels": List(Value("int32")),
            "loss_weights": List(Value("float32")),
        }
    )
    columns = {name: [getattr(sample, name) for sample in samples] for name in features}
    return Dataset.from_dict(columns, features=features)


@dataclass(frozen=True)
class _CompiledRow:
    generations: list[Generation]
    has_thinking: bool


def _compile_row(conversation: Conversation, rules: LossRules) -> _CompiledRow:
    has_thinking = any(message.is_reasoning for message in conversation.messages)
    return _CompiledRow(generations(conversation, rules), has_thinking)


def sample_of(generation: Generation, row: str) -> Sample:
    """A generation with its prompt, which has no loss; `row` is `file:line`."""
    return Sample(
        input_ids=generation.prompt_ids + generation.completion_ids,
        loss_weights=[0.0] * len(generation.prompt_ids) + generation.loss_weights,
        row=row,
        generation=generation.index,
    )
