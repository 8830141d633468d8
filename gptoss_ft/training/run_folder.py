"""The folder of one run: everything that is needed to repeat it, and everything that it made."""

import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from gptoss_ft.errors import ConfigError, UserError
from gptoss_ft.files import write_whole

# What may differ between a run and its resumption: where and how often things are recorded, not what is learned.
MAY_CHANGE = {
    "run.dir",
    "run.resume",
    *(
        f"trainer.{name}"
        for name in (
            "logging_steps",
            "eval_steps",
            "save_steps",
            "save_total_limit",
            "report_to",
            "per_device_eval_batch_size",
        )
    ),
}
PACKAGES = ("gptoss-ft", "transformers", "peft", "accelerate", "datasets", "bitsandbytes", "safetensors")


class RunFolder:
    """Paths below `run.dir`."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.versions = self.path / "versions.json"
        self.rounding = self.path / "rounding.json"
        self.metrics = self.path / "metrics.jsonl"
        self.audit = self.path / "audit.json"
        self.summary = self.path / "summary.json"
        self.checkpoints = self.path / "checkpoints"
        self.adapter = self.path / "adapter"
        self.exports = self.path / "export"

    def check_unused(self, *, except_for: Path) -> None:
        """Raise `UserError` if the folder holds anything but `except_for`, a base checkpoint made for the run."""
        taken = [entry for entry in self.path.iterdir() if entry != except_for] if self.path.is_dir() else []
        if taken:
            resumable = self._newest_checkpoint() is not None and not self.adapter.exists()
            cure = "set run.resume=true to go on with the run in it" if resumable else "remove it"
            raise UserError(
                f"run.dir={self.path} is in use (it holds {taken[0].name}): choose another folder, or {cure}"
            )

    def last_checkpoint(self) -> Path:
        """The newest checkpoint to resume from.

        Raises:
            UserError: if there is none, or the run has ended.
        """
        if self.adapter.exists():
            raise UserError(
                f"run.resume=true, but the run in {self.path} has ended (it has {self.adapter.name}/): "
                f"export it with `gptoss-ft export run={self.path}`, or start a new run in another run.dir"
            )
        found = self._newest_checkpoint()
        if found is None:
            raise UserError(
                f"run.resume=true, but {self.checkpoints} holds no checkpoint: start anew in another run.dir, "
                "with trainer.save_steps above 0 to have some next time"
            )
        return found

    def _newest_checkpoint(self) -> Path | None:
        found = get_last_checkpoint(str(self.checkpoints)) if self.checkpoints.is_dir() else None
        return None if found is None else Path(found)

    def check_resumed_config(self, config_yaml: str) -> None:
        """Refuse to go on with settings under which the first part of the run would have been another.

        Raises:
            ConfigError: naming the key.
        """
        before, now = (_flat(yaml.safe_load(text)) for text in (self.config.read_text("utf-8"), config_yaml))
        for key in sorted(before.keys() | now.keys()):
            if key not in MAY_CHANGE and not key.startswith("export.") and before.get(key) != now.get(key):
                raise ConfigError(
                    f"run.resume=true, but {key} is {now.get(key)} and the run began with {before.get(key)}: "
                    "leave it as it was, or start a new run"
                )

    def forget_metrics_after(self, step: int) -> None:
        """Drop the metrics of steps that a resumed run will take again."""
        lines = self.metrics.read_text("utf-8").splitlines() if self.metrics.is_file() else []
        write_whole(self.metrics, "".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= step))

    def first_evaluation(self) -> float | None:
        """The held-out loss in nats before training, if it was measured."""
        lines = self.metrics.read_text("utf-8").splitlines() if self.metrics.is_file() else []
        measured = [json.loads(line) for line in lines if "eval_loss_nats" in line]
        return measured[0]["eval_loss_nats"] if measured else None

    def write_rounding(self, rule: str) -> None:
        """Record the rule of rounding that the run trains through."""
        write_json(self.rounding, {"trained_through": rule})

    def trained_rounding(self) -> str | None:
        """What `write_rounding` recorded; None if nothing is.

        Raises:
            UserError: if the record is damaged.
        """
        if not self.rounding.is_file():
            return None
        try:
            return str(json.loads(self.rounding.read_bytes())["trained_through"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.rounding} is damaged: remove it to use {self.path} without this check") from error

    def write_origin(self, config_yaml: str) -> None:
        """Record the resolved config, and the versions and machine it runs on."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_whole(self.config, config_yaml)
        write_json(self.versions, origin())


def origin() -> dict[str, object]:
    """Versions of what takes part in a run, the commit of a source checkout, and the machine."""
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        # With its build, such as +cpu or +cu130, which the package's metadata may leave out.
        "torch": torch.__version__,
        "commit": _commit(),
        "machine": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "num_threads": torch.get_num_threads(),
    }


def checkpoint_steps(checkpoint: Path) -> tuple[int, int]:
    """Steps done when a checkpoint was written, and steps planned for its run."""
    state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text("utf-8"))
    return state["global_step"], state["max_steps"]


def write_json(path: Path, content: object) -> None:
    """Write indented JSON, whole or not at all."""
    write_whole(path, json.dumps(content, indent=2) + "\n")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed package may lie inside somebody else's repository; ours tracks this very file.
    return git("rev-parse", "HEAD") if git("ls-files", "--error-unmatch", __file__) else None
