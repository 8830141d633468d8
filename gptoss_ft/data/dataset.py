"""Rows to token samples: one sample per generation, every drop counted."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from datasets import Dataset, Features, List, Value
from tqdm.auto import tqdm

from gptoss_ft.data.schemas.messages import read_messages_row
from gptoss_ft.data.source import read_rows
from gptoss_ft.errors import ConfigError, UserError
from gptoss_ft.harmony.conversation import Conversation, ReasoningEffort
from gptoss_ft.harmony.generations import Generation, generations

IGNORED_LABEL = -100  # what torch's cross entropy skips
READERS: dict[str, Callable[..., Conversation]] = {"messages": read_messages_row}


@dataclass(frozen=True)
class Sample:
    """One generation as tokens; `labels` equals `input_ids` where there is loss and is -100 elsewhere.

    `row` is `file:line`, `generation` counts from 0 within the row.
    """

    input_ids: list[int]
    labels: list[int]
    row: str
    generation: int


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
    format: str = "messages",
    default_reasoning_effort: ReasoningEffort = "medium",
    max_length: int,
    progress: bool = False,
) -> CompiledSamples:
    """Compile every row of the files.

    A sample over `max_length` tokens is dropped, never cut: a cut one would not teach the model to stop.

    Raises:
        UserError: naming file and line, if a row cannot be used; or if no sample is left.
        ConfigError: if `format` is unknown.
    """
    if format not in READERS:
        raise ConfigError(f"data.format: {format!r} is not known; use one of {', '.join(READERS)}")
    read = partial(READERS[format], default_reasoning_effort=default_reasoning_effort)
    compiled: list[Sample] = []
    rows = rows_without_thinking = 0
    for path in paths:
        for line, row in tqdm(read_rows(path), desc=f"compiling {Path(path).name}", unit=" rows", disable=not progress):
            conversation, samples = _compile_row(row, read, where=f"{path}:{line}")
            compiled += samples
            rows += 1
            rows_without_thinking += not any(message.is_reasoning for message in conversation.messages)
    with_loss = [sample for sample in compiled if _num_loss_tokens(sample)]
    kept = [sample for sample in with_loss if len(sample.input_ids) <= max_length]
    result = CompiledSamples(
        samples=kept,
        rows=rows,
        rows_without_thinking=rows_without_thinking,
        generations=len(compiled),
        dropped_too_long=len(with_loss) - len(kept),
        dropped_without_loss=len(compiled) - len(with_loss),
        tokens=sum(len(sample.input_ids) for sample in kept),
        loss_tokens=sum(map(_num_loss_tokens, kept)),
    )
    if not kept:
        shortest = min((len(sample.input_ids) for sample in with_loss), default=0)
        raise UserError(
            f"no sample is left of {rows} rows in {', '.join(map(str, paths))}: {result.dropped_too_long} longer than "
            f"{max_length} tokens (the shortest has {shortest}), {result.dropped_without_loss} with no loss on any "
            "token; raise data.max_length or choose other rows"
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
    """Columns `input_ids` and `labels`, int32 lists."""
    features = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32"))})
    columns = {
        "input_ids": [sample.input_ids for sample in samples],
        "labels": [sample.labels for sample in samples],
    }
    return Dataset.from_dict(columns, features=features)


def _compile_row(
    row: Mapping[str, Any], read: Callable[[Mapping[str, Any]], Conversation], where: str
) -> tuple[Conversation, list[Sample]]:
    try:
        conversation = read(row)
        found = generations(conversation)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except RecursionError as error:
        raise UserError(f"{where}: lists and objects are nested too deeply; flatten them") from error
    return conversation, [_sample(generation, where) for generation in found]


def _sample(generation: Generation, row: str) -> Sample:
    weighted = zip(generation.completion_ids, generation.loss_weights, strict=True)
    labels = [token if weight > 0 else IGNORED_LABEL for token, weight in weighted]
    return Sample(
        input_ids=generation.prompt_ids + generation.completion_ids,
        labels=[IGNORED_LABEL] * len(generation.prompt_ids) + labels,
        row=row,
        generation=generation.index,
    )


def _num_loss_tokens(sample: Sample) -> int:
    return sum(label != IGNORED_LABEL for label in sample.labels)
