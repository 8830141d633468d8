"""Run a benchmark of this folder and append what it measured to results.csv.

    python benchmarks/record.py gemm.py --rows 64 256

Each number of the benchmark's last line of JSON becomes a row: when, commit, machine, command, metric, value, unit.
"""

import csv
import json
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import psutil
import torch

from gptoss_ft.kernels import cpu_library

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results.csv"
COLUMNS = ("date", "commit", "machine", "command", "metric", "value", "unit")
# By a part of a metric's name.
UNITS = {
    "share": "1",
    "speedup": "x",
    "ratio": "x",
    "memory_ratio": "x",
    "bytes": "B",
    "_gb": "GB",
    "_s": "s",
    "_per_s": "1/s",
    "seconds": "s",
    "_gflops": "GFLOP/s",
    "tokens": "tokens",
    "tensors": "tensors",
}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        raise SystemExit(__doc__)
    command = [*sys.argv[1:], "--json"]
    if git("status", "--porcelain", "--untracked-files=no", "--", ":/", f":!{RESULTS.name}"):
        raise SystemExit("commit first: a result belongs to a commit")
    run = subprocess.Popen([sys.executable, str(FOLDER / command[0]), *command[1:]], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    last = ""
    for last in run.stdout:
        print(last, end="", flush=True)
    if run.wait():
        raise SystemExit(run.returncode)
    metrics = json.loads(last)
    if bounds := metrics.pop("bounds", []):
        raise SystemExit(f"no results but bounds: {', '.join(bounds)}; run again with a higher --limit")
    # Where this machine keeps its files says nothing to others.
    append(" ".join(Path(word).name if Path(word).is_absolute() else word for word in command[:-1]), metrics)


def append(command: str, metrics: dict[str, float]) -> None:
    """Add one row for each metric."""
    now, commit = datetime.now(UTC).strftime("%Y-%m-%d"), git("rev-parse", "--short", "HEAD")
    is_new = not RESULTS.exists()
    with RESULTS.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(COLUMNS)
        for metric, value in metrics.items():
            writer.writerow((now, commit, machine(), command, metric, value, unit(metric)))


def unit(metric: str) -> str:
    """The unit that a metric's name implies; the longest match wins, as in tokens_per_s."""
    matches = [part for part in UNITS if f"_{part.strip('_')}_" in f"_{metric}_"]
    if not matches:
        raise SystemExit(f"{metric} has no unit: name it, or add one to UNITS")
    return UNITS[max(matches, key=len)]


def machine() -> str:
    """Processor, cores and memory."""
    isa = cpu_library.selected_isa() if cpu_library.library() else "no library"
    memory = round(psutil.virtual_memory().total / 2**30)
    return f"{processor()}, {torch.get_num_threads()} threads, {isa}, {memory} GiB"


def processor() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def git(*arguments: str) -> str:
    """The output of a git command in this repository."""
    return subprocess.run(["git", "-C", FOLDER, *arguments], capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
