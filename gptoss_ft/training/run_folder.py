"""The folder of one run: everything that is needed to repeat it, and everything that it made."""

import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from transformers.trainer_utils import get_last_checkpoint

from gptoss_ft.errors import UserError
from gptoss_ft.files import write_whole

PACKAGES = ("gptoss-ft", "transformers", "peft", "accelerate", "datasets", "bitsandbytes", "safetensors")


class RunFolder:
    """Paths below `run.dir`."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.versions = self.path / "versions.json"
        self.metrics = self.path / "metrics.jsonl"
        self.audit = self.path / "audit.json"
        self.summary = self.path / "summary.json"
        self.checkpoints = self.path / "checkpoints"
        self.adapter = self.path / "adapter"
        self.exports = self.path / "export"

    def check_unused(self, *, except_for: Path) -> None:
        """Raise `UserError` if the folder holds anything but `except_for`, a base checkpoint made for the run."""
        taken = [entry for entry in self.path.iterdir() if entry != except_for] if self.path.exists() else []
        if taken:
            raise UserError(
                f"run.dir={self.path} is in use (it holds {taken[0].name}): "
                "choose another folder, or set run.resume=true to go on with the run in it"
            )

    def last_checkpoint(self) -> Path:
        """The newest checkpoint to resume from.

        Raises:
            UserError: if there is none.
        """
        found = get_last_checkpoint(str(self.checkpoints)) if self.checkpoints.is_dir() else None
        if found is None:
            raise UserError(f"run.resume=true, but {self.checkpoints} holds no checkpoint: start without it")
        return Path(found)

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


def write_json(path: Path, content: object) -> None:
    """Write indented JSON, whole or not at all."""
    write_whole(path, json.dumps(content, indent=2) + "\n")


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
