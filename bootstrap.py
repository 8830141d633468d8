#!/usr/bin/env python3
"""Make `.venv`, install gptoss-ft there, and run it. Needs nothing but Python 3.11 to 3.13.

With GCC or Clang on the PATH, the package's CPU kernels are compiled; without, packed experts run in plain torch.

python3 bootstrap.py quickstart [key=value ...]     train, export and verify the tiny model
python3 bootstrap.py test [pytest arguments ...]    run the tests
python3 bootstrap.py install                        only install
python3 bootstrap.py check                          the linters, and the slow tests that `test` leaves out

GPTOSS_FT_VENV names another folder than `.venv`.
"""

# Old Pythons must get as far as being told that they are old.
from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = Path(os.environ.get("GPTOSS_FT_VENV") or ROOT / ".venv").absolute()
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
TORCH = "torch==2.13.*"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
EXTRAS = {"install": "", "quickstart": "", "test": "[test]", "check": "[dev]"}


def main(argv: list[str]) -> int:
    job, *words = argv or ["--help"]
    if job not in EXTRAS:
        print(__doc__)
        return 0 if job in ("-h", "--help") else 2
    check_python()
    make_venv()
    install(EXTRAS[job])
    jobs = {
        "install": [],
        "quickstart": [[tool("gptoss-ft"), "train", "config=quickstart", *words]],
        "test": [[tool("python"), "-m", "pytest", *words]],
        "check": [
            [tool("ruff"), "check"],
            [tool("ruff"), "format", "--check"],
            [tool("codespell")],
            [tool("mypy")],
            [tool("python"), "-m", "pytest", "-m", "slow", *words],
        ],
    }
    return max((step(command) for command in jobs[job]), default=0)


def check_python() -> None:
    """Stop where no release of the dependencies would install."""
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        sys.exit(
            f"error: gptoss-ft needs Python 3.11, 3.12 or 3.13 and this is {platform.python_version()}: "
            "run bootstrap.py with another one, such as python3.12"
        )


def make_venv() -> None:
    """Create `.venv`, or keep the one that is there."""
    if Path(tool("python")).exists():
        print(f"==> using {VENV}", flush=True)
        return
    if importlib.util.find_spec("ensurepip") is None:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        sys.exit(f"error: this Python cannot make virtual environments: apt install python{version}-venv and try again")
    if step([sys.executable, "-m", "venv", str(VENV)]):
        # Half an environment would be taken for a whole one next time.
        shutil.rmtree(VENV, ignore_errors=True)
        sys.exit(f"error: could not make {VENV}")


def install(extras: str) -> None:
    """Install torch, this project and the reference model into `.venv`."""
    # torch goes first and alone, so that nothing else chooses its build.
    pip(TORCH, *cpu_index())
    pip("--editable", f"{ROOT}{extras}")
    # `gptoss-ft verify` needs the reference model's torch code only; the package asks for Python 3.12 and for the
    # web servers, browsers and containers of its demonstrations.
    pip("--no-deps", "--ignore-requires-python", "gpt-oss==0.0.9")


def cpu_index() -> list[str]:
    """Arguments that make pip prefer a torch without CUDA; only Linux machines without a GPU need any."""
    if has_gpu() or sys.platform != "linux":
        return []
    try:
        urllib.request.urlopen(f"{CPU_INDEX}/torch/", timeout=10).close()
    except (urllib.error.URLError, TimeoutError) as error:
        print(f"==> {CPU_INDEX} cannot be reached ({error}): pip's own choice of torch will do, but may be larger")
        return []
    return ["--extra-index-url", CPU_INDEX]


def has_gpu() -> bool:
    """Whether an NVIDIA driver answers with at least one device."""
    if shutil.which("nvidia-smi") is None:
        return False
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return listing.returncode == 0 and "GPU" in listing.stdout


def pip(*arguments: str) -> None:
    """Install, or stop with pip's own account of why not."""
    command = [tool("python"), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off"]
    if step([*command, *arguments]):
        sys.exit(f"error: pip could not install {arguments[-1]}; its reasons are above")


def tool(name: str) -> str:
    """The path of a program in `.venv`."""
    return str(BIN / (f"{name}.exe" if os.name == "nt" else name))


def step(command: list[str]) -> int:
    """Print a command, run it in the checkout and return its exit status."""
    print("==>", *command, flush=True)
    return subprocess.run(command, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
