"""Compare an exported folder with the model that its run trained."""

from pathlib import Path

from gptoss_ft.config.catalog import rows_fault
from gptoss_ft.config.schema import DataConfig, VerifyCommand
from gptoss_ft.data.sample_table import SampleTable
from gptoss_ft.errors import UserError
from gptoss_ft.export.fingerprint import check_fingerprint
from gptoss_ft.export.verdict import VerifyReport
from gptoss_ft.export.verify import verify_export
from gptoss_ft.model.checkpoint import Checkpoint
from gptoss_ft.recipes.export import config_of, record_path
from gptoss_ft.recipes.samples import compile_rows, held_out_samples
from gptoss_ft.training.run_folder import RunFolder, write_json

MAX_TOKENS = 512


def main(cfg: VerifyCommand) -> bool:
    """Run `gptoss-ft verify`: print the report; False if the export is beyond its bounds or could not be verified."""
    report = verify_run(
        Path(cfg.run),
        Path(cfg.path),
        base=Path(cfg.base) if cfg.base else None,
        data=Path(cfg.data) if cfg.data else None,
        max_tokens=cfg.max_tokens,
    )
    print(report)
    return report.passed


def verify_run(
    run_path: Path,
    export: Path,
    *,
    base: Path | None = None,
    data: Path | None = None,
    max_tokens: int = MAX_TOKENS,
) -> VerifyReport:
    """Verify an export of a run and record the report in the run folder, see `record_path`.

    Args:
        base: the base checkpoint, if it is no longer where the run's config says.
        data: rows to compare on; None takes those that the run held out, or its training rows if it held out none.
        max_tokens: positions to compare at most.
    """
    run = RunFolder(run_path)
    cfg = config_of(run)
    checkpoint = Checkpoint.open(base or cfg.model.path)
    check_fingerprint(run.path, checkpoint)
    report = verify_export(
        base=checkpoint.path,
        adapter=run.adapter,
        export=export,
        samples=compile_rows([data], cfg.data).samples if data else rows_of_run(cfg.data, cfg.seed),
        max_tokens=max_tokens,
        merged_training=cfg.adapter.qat,
    )
    write_json(record_path(run, "verify", report.format, export), report.to_dict())
    return report


def rows_of_run(cfg: DataConfig, seed: int) -> SampleTable:
    """`held_out_samples`, once their files are known to be where they were during training.

    Raises:
        UserError: naming the first file that is not.
    """
    for path in cfg.eval_path or cfg.path:
        if fault := rows_fault(path):
            raise UserError(f"{path}: {fault}; the run's rows have moved, so name rows to compare on: data=FILE")
    return held_out_samples(cfg, seed)
