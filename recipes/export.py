"""From a finished run to a folder that a server loads."""

from pathlib import Path

from gptoss_ft.config.load import compose_train_config
from gptoss_ft.config.schema import ExportCommand
from gptoss_ft.errors import UserError
from gptoss_ft.export.adapter import export_adapter, read_adapter
from gptoss_ft.export.merge import merge
from gptoss_ft.model.checkpoint import Checkpoint
from gptoss_ft.training.run_folder import RunFolder, write_json


def main(cfg: ExportCommand) -> Path:
    """Run `gptoss-ft export`; returns the exported folder."""
    return export_run(Path(cfg.run), cfg.format.value, Path(cfg.out), base=cfg.base and Path(cfg.base))


def export_run(run_path: Path, format: str, out: Path, *, base: Path | None = None) -> Path:
    """Export a run's adapter as it is, or merged into its base as bf16 or MXFP4.

    Args:
        base: the base checkpoint, if it is no longer where the run's config says.
    """
    run = RunFolder(run_path)
    checkpoint = Checkpoint.open(base or base_of(run))
    if format == "adapter":
        return export_adapter(run.adapter, out, checkpoint)
    report = merge(checkpoint, read_adapter(run.adapter, checkpoint.spec), out, format=format, progress=True)
    write_json(run.path / f"merge-{out.name}.json", report.to_dict())
    print(report)
    return out


def base_of(run: RunFolder) -> Path:
    """The base checkpoint that a run trained on, by its config."""
    if not run.config.is_file():
        raise UserError(f"{run.path} has no {run.config.name}: it is not the folder of a training run")
    return Path(compose_train_config([f"config={run.config}"]).model.path)
