"""The samples that a run trains on and those that it holds out, by the data section of its config."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from gptoss_ft.config.catalog import rows_fault
from gptoss_ft.config.schema import DataConfig, RowsConfig
from gptoss_ft.data.cache import cached, writable_folder
from gptoss_ft.data.dataset import CompiledSamples, compile_samples, split_rows
from gptoss_ft.data.mixture import mix
from gptoss_ft.data.rows import OnError, RowSettings
from gptoss_ft.data.sample_table import SampleTable
from gptoss_ft.data.skipped import SkippedRows
from gptoss_ft.errors import UserError
from gptoss_ft.harmony.conversation import BuiltinTool, Conversation, ReasoningEffort
from gptoss_ft.harmony.weights import LossPolicy, LossRules, MissingReasoning


def compile_rows(
    paths: Sequence[str | Path], cfg: DataConfig, *, skipped: SkippedRows | None = None, verbose: bool = False
) -> CompiledSamples:
    """Compile rows by the data section's settings.

    Args:
        skipped: takes the rows that `data.on_error=skip` leaves out.
        verbose: show the progress and say which format each file is read in.

    Raises:
        UserError: naming file and line, if a row cannot be used; or if no sample is left.
    """
    settings, rules = row_settings(cfg), loss_rules(cfg)
    skipped = SkippedRows() if skipped is None else skipped
    announce: Callable[[str], object] = print if verbose else lambda text: None

    def compile(out: Path | None) -> CompiledSamples:
        return compile_samples(
            paths,
            rows=settings,
            rules=rules,
            max_length=cfg.max_length,
            out=out,
            skipped=skipped,
            announce=announce,
            progress=verbose,
        )

    if not cfg.cache:
        return compile(None)
    # Any number of processes gives the same samples.
    of_samples = (replace(settings, num_processes=0), rules, cfg.max_length)
    folder = writable_folder(cfg.cache_dir)
    return cached(folder, paths, of_samples, compile, skipped=skipped, announce=announce)


def row_settings(cfg: RowsConfig) -> RowSettings:
    """How rows are read."""
    return RowSettings(
        format=cfg.format.value,
        defaults=conversation_defaults(cfg),
        on_error=cast(OnError, cfg.on_error.value),
        max_skipped=cfg.max_skipped,
        num_processes=cfg.num_processes,
    )


def conversation_defaults(cfg: RowsConfig) -> Conversation:
    """What the system message says where a row says nothing."""
    return Conversation(
        messages=(),
        reasoning_effort=cast(ReasoningEffort, cfg.reasoning_effort.value),
        knowledge_cutoff=cfg.knowledge_cutoff,
        conversation_start_date=cfg.current_date,
        model_identity=cfg.identity,
        builtin_tools=tuple(cast(BuiltinTool, tool.value) for tool in cfg.builtin_tools),
    )


def loss_rules(cfg: RowsConfig) -> LossRules:
    """What of a conversation has loss, and how much."""
    return LossRules(
        policy=cast(LossPolicy, cfg.policy.value),
        analysis=cfg.analysis_weight,
        commentary=cfg.commentary_weight,
        final=cfg.final_weight,
        preambles=cfg.preambles,
        missing_reasoning=cast(MissingReasoning, cfg.missing_reasoning.value),
    )


def split_samples(
    cfg: DataConfig, seed: int, *, skipped: SkippedRows | None = None, verbose: bool = False
) -> tuple[SampleTable, SampleTable, list[CompiledSamples]]:
    """Training samples, held-out samples (empty if nothing is held out), and what was compiled, for its counts.

    Held out are the rows of `eval_path`, or else a share `eval_fraction` of the training rows, drawn by `seed`.
    """
    compiled = [compile_rows(cfg.path, cfg, skipped=skipped, verbose=verbose)]
    train, held_out = split_rows(compiled[0].samples, cfg.eval_fraction, seed)
    if cfg.weights is not None:
        train = mix(train, cfg.path, cfg.weights, seed)
    if cfg.eval_path:
        compiled.append(compile_rows(cfg.eval_path, cfg, skipped=skipped, verbose=verbose))
        held_out = compiled[1].samples
    return train, held_out, compiled


def held_out_samples(cfg: DataConfig, seed: int) -> SampleTable:
    """The samples a run did not train on, or its training samples if it held out none; reads only their files."""
    if cfg.eval_path:
        return compile_rows(cfg.eval_path, cfg).samples
    train, held_out, _ = split_samples(cfg, seed)
    return held_out or train


def rows_to_compare(cfg: DataConfig, seed: int, data: Path | None, *, otherwise: str = "") -> SampleTable:
    """The samples of `data`, else `held_out_samples`, once their files are known to be where they were in training.

    Raises:
        UserError: naming the first file that is not; `otherwise` says what can be done but for naming other rows.
    """
    if data:
        return compile_rows([data], cfg).samples
    for path in cfg.eval_path or cfg.path:
        if fault := rows_fault(path):
            raise UserError(
                f"{path}: {fault}; the run's rows have moved, so name rows to compare on: data=FILE{otherwise}"
            )
    return held_out_samples(cfg, seed)
