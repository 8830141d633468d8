"""Compare an exported folder with the model that its run trained."""

from pathlib import Path

from gptoss_ft.config.commands import VerifyCommand
from gptoss_ft.config.values import MIN_FIDELITY
from gptoss_ft.export.merge_record import check_base_of_merge
from gptoss_ft.export.verdict import VerifyReport
from gptoss_ft.export.verify import verify_export
from gptoss_ft.recipes.export import base_of, config_of, record_path
from gptoss_ft.recipes.machine import check_variables
from gptoss_ft.recipes.samples import rows_to_compare
from gptoss_ft.training.run_folder import RunFolder, write_json

MAX_TOKENS = 512


def main(cfg: VerifyCommand) -> bool:
    """Run `gptoss-ft verify`: print the report; False if the export is beyond its bounds or could not be verified."""
    check_variables()
    report = verify_run(
        Path(cfg.run),
        Path(cfg.path),
        base=Path(cfg.base) if cfg.base else None,
        data=Path(cfg.data) if cfg.data else None,
        max_tokens=cfg.max_tokens,
        min_fidelity=cfg.min_fidelity,
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
    min_fidelity: float = MIN_FIDELITY,
) -> VerifyReport:
    """Verify an export of a run and record the report in the run folder, see `record_path`.

    Args:
        base: the base checkpoint, if it is no longer where the run's config says.
        data: rows to compare on; None takes those that the run held out, or its training rows if it held out none.
        max_tokens: positions to compare at most.
        min_fidelity: what a merged model has to keep of the training.
    """
    run = RunFolder(run_path)
    cfg = config_of(run)
    checkpoint = base_of(run, cfg, base)
    check_base_of_merge(run.path, export, checkpoint)
    report = verify_export(
        base=checkpoint.path,
        adapter=run.adapter,
        export=export,
        samples=rows_to_compare(cfg.data, cfg.seed, data),
        max_tokens=max_tokens,
        merged_training=cfg.adapter.qat,
        min_fidelity=min_fidelity,
    )
    write_json(record_path(run, "verify", report.format, export), report.to_dict())
    return report
