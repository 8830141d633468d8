"""The verdicts of self-checks, remembered for this process and in a file for later ones in the same environment."""

import hashlib
import json
import logging
import os
import platform
import tempfile
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch

import gptoss_ft.kernels
from gptoss_ft.kernels import cpu_library
from gptoss_ft.kernels.selfcheck import Verdict

log = logging.getLogger(__name__)


class Key(NamedTuple):
    operation: str
    implementation: str
    device: torch.device
    dtype: torch.dtype


_verdicts: dict[Key, Verdict] = {}


def remembered(key: Key) -> Verdict | None:
    """The verdict of this process, or of an earlier one in the same environment."""
    if key not in _verdicts:
        found = _read(key.device).get(_entry(key))
        if found is not None:
            _verdicts[key] = found
    return _verdicts.get(key)


def remember(key: Key, verdict: Verdict) -> Verdict:
    """Keep a verdict for this process and later ones; returns it."""
    _verdicts[key] = verdict
    # What raised, such as a compiler that was not found, may be mended without a trace in the environment.
    if not verdict.fault:
        _write(key.device, {**_read(key.device), _entry(key): verdict})
    return verdict


def forget(device: torch.device) -> None:
    """Drop what this process and earlier ones found on a device: everything is checked anew."""
    for key in [key for key in _verdicts if key.device == device]:
        del _verdicts[key]
    _write(device, {})


def cache_folder() -> Path:
    """Where verdicts are kept, one file for each environment."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "gptoss-ft" / "selfcheck"


@cache
def environment(device: torch.device) -> dict[str, str]:
    """Everything that a kernel's result depends on besides its operands."""
    found = {
        "kernels": _hash_of_kernels(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "TRITON_INTERPRET": os.environ.get("TRITON_INTERPRET", ""),
    }
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        driver = Path("/proc/driver/nvidia/version")
        return found | {
            "device": torch.cuda.get_device_name(device),
            "capability": f"{major}.{minor}",
            "driver": driver.read_text("utf-8").splitlines()[0] if driver.is_file() else "",
        }
    return found | {"device": cpu_name() if device.type == "cpu" else device.type}


@cache
def cpu_name() -> str:
    """The processor as Linux names it, or as far as Python knows it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _hash_of_kernels() -> str:
    # Sources and not only the version: they change under an editable install, and Triton compiles from them.
    folders = [Path(folder) for folder in gptoss_ft.kernels.__path__]
    files = {file for folder in folders for file in folder.rglob("*.py")}
    built = cpu_library.library_file()
    digest = hashlib.sha256()
    for file in sorted(files | ({built} if built else set())):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _file(device: torch.device) -> Path:
    name = hashlib.sha256(json.dumps(environment(device)).encode()).hexdigest()[:16]
    return cache_folder() / f"{name}.json"


def _entry(key: Key) -> str:
    return f"{key.operation} {key.implementation} {key.dtype}"


def _read(device: torch.device) -> dict[str, Verdict]:
    """The verdicts on file; none if it cannot be read or is not what `_write` writes, and it is written anew then."""
    try:
        content = json.loads(_file(device).read_text("utf-8"))["verdicts"]
        return {str(entry): Verdict(float(error), float(budget)) for entry, (error, budget) in content.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _write(device: torch.device, verdicts: dict[str, Verdict]) -> None:
    file = _file(device)
    content = {
        "environment": environment(device),
        "verdicts": {entry: [verdict.error, verdict.budget] for entry, verdict in verdicts.items()},
    }
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Several processes may write at once: each file is whole, and what the last one did not know is checked again.
        descriptor, partial = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}-")
        try:
            with open(descriptor, "w", encoding="utf-8") as written:
                json.dump(content, written, indent=2)
            os.replace(partial, file)
        except OSError:
            os.unlink(partial)
            raise
    except OSError as error:
        log.info(f"self-checks are not remembered and run again in every process: {error}")
