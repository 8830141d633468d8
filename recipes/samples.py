"""The samples that a run trains on and those that it holds out, by the data section of its config."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from gptoss_ft.config.schema import DataConfig
from gptoss_ft.data.dataset import CompiledSamples, Sample, compile_samples, split_rows
from gptoss_ft.harmony.conversation import ReasoningEffort


def compile_rows(paths: Sequence[str | Path], cfg: DataConfig, *, progress: bool = False) -> CompiledSamples:
    """Compile row files by the data section's settings.

    Raises:
        UserError: naming file and line, if a row cannot be used; or if no sample is left.
    """
    return compile_samples(
        paths,
        format=cfg.format.value,
        default_reasoning_effort=cast(ReasoningEffort, cfg.reasoning_effort.value),
        max_length=cfg.max_length,
        progress=progress,
    )


def split_samples(
    cfg: DataConfig, seed: int, *, progress: bool = False
) -> tuple[list[Sample], list[Sample], list[CompiledSamples]]:
    """Training samples, held-out samples (empty if nothing is held out), and what was compiled, for its counts.

    Held out are the rows of `eval_path`, or else a share `eval_fraction` of the training rows, drawn by `seed`.
    """
    compiled = [compile_rows(cfg.path, cfg, progress=progress)]
    train, held_out = split_rows(compiled[0].samples, cfg.eval_fraction, seed)
    if cfg.eval_path:
        compiled.append(compile_rows(cfg.eval_path, cfg, progress=progress))
        held_out = compiled[1].samples
    return train, held_out, compiled


def held_out_samples(cfg: DataConfig, seed: int) -> list[Sample]:
    """The samples a run did not train on, or its training samples if it held out none; reads only their files."""
    if cfg.eval_path:
        return compile_rows(cfg.eval_path, cfg).samples
    train, held_out, _ = split_samples(cfg, seed)
    return held_out or train
