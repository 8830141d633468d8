"""Compare an exported folder with the model that its run trained."""

from pathlib import Path
from typing import cast

from gptoss_ft.config.load import load_train_config
from gptoss_ft.config.schema import DataConfig, VerifyCommand
from gptoss_ft.data.dataset import Sample, compile_samples, split_rows
from gptoss_ft.errors import UserError
from gptoss_ft.export.verdict import VerifyReport
from gptoss_ft.export.verify import verify_export
from gptoss_ft.harmony.conversation import ReasoningEffort
from gptoss_ft.training.run_folder import RunFolder, write_json

MAX_TOKENS = 512


def main(cfg: VerifyCommand) -> bool:
    """Run `gptoss-ft verify`: print the report; False if the export is beyond its bounds."""
    report = verify_run(
        Path(cfg.run), Path(cfg.path), data=Path(cfg.data) if cfg.data else None, max_tokens=cfg.max_tokens
    )
    print(report)
    return report.passed


def verify_run(run_path: Path, export: Path, *, data: Path | None = None, max_tokens: int = MAX_TOKENS) -> VerifyReport:
    """Verify an export of a run and record the report as `verify-<name of the export>.json` in the run folder.

    Args:
        data: rows to compare on; None takes those that the run held out, or its training rows if it held out none.
        max_tokens: positions to compare at most.
    """
    run = RunFolder(run_path)
    if not run.config.is_file():
        raise UserError(f"{run.path} has no {run.config.name}: it is not the folder of a training run")
    cfg = load_train_config([f"config={run.config}"])
    report = verify_export(
        base=Path(cfg.model.path),
        adapter=run.adapter,
        export=export,
        samples=held_out_samples(cfg.data, cfg.seed) if data is None else compile_rows([str(data)], cfg.data),
        max_tokens=max_tokens,
    )
    write_json(run.path / f"verify-{export.resolve().name}.json", report.to_dict())
    return report


def held_out_samples(cfg: DataConfig, seed: int) -> list[Sample]:
    """The samples a run did not train on, or its training samples if it held out none."""
    train, held_out = split_rows(compile_rows(cfg.eval_path or cfg.path, cfg), cfg.eval_fraction, seed)
    return held_out or train


def compile_rows(paths: list[str], cfg: DataConfig) -> list[Sample]:
    """Samples of row files, by the data section's settings."""
    return compile_samples(
        paths,
        format=cfg.format.value,
        default_reasoning_effort=cast(ReasoningEffort, cfg.reasoning_effort.value),
        max_length=cfg.max_length,
    ).samples
