"""From a finished run to a folder that a server loads."""

import os
from hashlib import sha256
from pathlib import Path
from typing import Literal, cast

from gptoss_ft.config.load import compose_train_config
from gptoss_ft.config.schema import ExportCommand, TrainConfig
from gptoss_ft.errors import UserError
from gptoss_ft.export.adapter import export_adapter, read_adapter
from gptoss_ft.export.fingerprint import check_fingerprint
from gptoss_ft.export.gguf_adapter import export_adapter_gguf
from gptoss_ft.export.merge import MergeFormat, merge
from gptoss_ft.model.checkpoint import Checkpoint
from gptoss_ft.training.run_folder import RunFolder, write_json


def main(cfg: ExportCommand) -> Path:
    """Run `gptoss-ft export`; returns the exported folder."""
    return export_run(Path(cfg.run), cfg.format.value, Path(cfg.out), base=Path(cfg.base) if cfg.base else None)


def export_run(run_path: Path, format: str, out: Path, *, base: Path | None = None) -> Path:
    """Export a run's adapter, alone or merged into its base; a merge is recorded in the run folder.

    Args:
        format: a name of `ExportFormat`.
        base: the base checkpoint, if it is no longer where the run's config says.

    Raises:
        UserError: if the base is not the one that the run trained on, or the adapter or `out` cannot be used.
    """
    run = RunFolder(run_path)
    checkpoint = Checkpoint.open(base or config_of(run).model.path)
    check_fingerprint(run.path, checkpoint)
    if format == "adapter":
        return export_adapter(run.adapter, out, checkpoint)
    if format == "adapter_gguf":
        return export_adapter_gguf(run.adapter, out, checkpoint)
    deltas = read_adapter(run.adapter, checkpoint.spec)
    report = merge(checkpoint, deltas, out, format=cast(MergeFormat, format))
    write_json(record_path(run, "merge", format, out), report.to_dict())
    print(report)
    return out


def config_of(run: RunFolder) -> TrainConfig:
    """The config that a run was started with; the files it names need not exist any more."""
    if not run.config.is_file():
        raise UserError(f"{run.path} has no {run.config.name}: it is not the folder of a training run")
    return compose_train_config([f"config={run.config}"])


def record_path(run: RunFolder, kind: Literal["merge", "verify"], format: str, export: Path) -> Path:
    """The file in the run folder that says how an export was merged or verified; no two exports share one.

    `merge-mxfp4.json` is of the run's own `export/mxfp4`. A folder elsewhere adds its name and the start of a sha256
    of its absolute path: `merge-mxfp4-NAME-1f2e3d4c.json`.
    """
    export = export.resolve()
    if export == (run.exports / format).resolve():
        return run.path / f"{kind}-{format}.json"
    digest = sha256(os.fsencode(export)).hexdigest()[:8]
    return run.path / f"{kind}-{format}-{export.name}-{digest}.json"
