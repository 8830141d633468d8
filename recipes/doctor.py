"""What each kernel runs in on this machine: checked against fp64, timed, and the reasons for what does not run."""

import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch
from tqdm import tqdm

from gptoss_ft.config.commands import DoctorCommand
from gptoss_ft.errors import UserError
from gptoss_ft.files import check_writable_parent, write_whole
from gptoss_ft.kernels import cpu_library, dispatch, selfcheck, verdicts
from gptoss_ft.kernels.cases import AWKWARD, GPT_OSS_20B_CPU, GPT_OSS_20B_GPU, Draw
from gptoss_ft.kernels.registry import REFERENCE, Operation, Refused, short
from gptoss_ft.recipes.machine import check_variables

GIB = 2**30
PACKAGES = ("gptoss-ft", "torch", "triton", "transformers", "peft", "bitsandbytes")
HEADER = ("operation", "device", "dtype", "runs in", "error", "allowed", "speed", "not run")
# Enough repetitions for a best one, and no more than a moment: plain torch may take seconds for a single call.
MEASURE_SECONDS = 0.2


@dataclass(frozen=True)
class Row:
    """One operation on one device in one dtype.

    Errors are shares of the largest number in the result; None is allowed to plain torch, which sets the measure.
    """

    operation: str
    device: str
    dtype: str
    implementation: str
    error: float
    allowed: float | None
    speed: float
    unit: str
    refused: tuple[Refused, ...]


@dataclass(frozen=True)
class Report:
    """The machine, and what it does with each operation."""

    machine: dict[str, str]
    rows: list[Row]

    @property
    def failures(self) -> list[Row]:
        """Rows with an implementation that should run and computes wrong results, or none."""
        return [row for row in self.rows if any(refused.failed for refused in row.refused)]

    def __str__(self) -> str:
        width = max(map(len, self.machine))
        facts = [f"{name:<{width}}  {value}" for name, value in self.machine.items()]
        return "\n".join([*facts, "", *self._table(), "", *self._notes(), self._conclusion()])

    def _table(self) -> list[str]:
        numbers = self._numbers()
        lines = [HEADER]
        for row in self.rows:
            allowed = "-" if row.allowed is None else f"{row.allowed:.1e}"
            speed = f"{row.speed:,.1f} {row.unit}"
            marks = " ".join(f"[{number}]" for number in sorted({numbers[refused] for refused in row.refused}))
            names = (row.operation, row.device, row.dtype, row.implementation)
            lines.append((*names, f"{row.error:.1e}", allowed, speed, marks))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        cells = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
        return ["  ".join(line).rstrip() for line in cells]

    def _notes(self) -> list[str]:
        names: dict[tuple[int, str], dict[str, None]] = {}
        for refused, number in self._numbers().items():
            names.setdefault((number, refused.reason), {})[refused.implementation] = None
        lines = [f"[{number}] {', '.join(of)}: {reason}" for (number, reason), of in names.items()]
        return [*lines, ""] if lines else []

    def _numbers(self) -> dict[Refused, int]:
        """The note of each refusal; equal reasons share one."""
        reasons: dict[str, int] = {}
        refusals = [refused for row in self.rows for refused in row.refused]
        return {refused: reasons.setdefault(refused.reason, len(reasons) + 1) for refused in refusals}

    def _conclusion(self) -> str:
        if self.failures:
            rows = ", ".join(f"{row.operation} in {row.dtype} on {row.device}" for row in self.failures)
            return f"FAILED: {rows}. What is in the column 'runs in' takes over, so results stay right."
        slow = sorted({row.device for row in self.rows if row.implementation == REFERENCE and row.refused})
        if slow:
            return f"Every kernel that runs is right, but on {', '.join(slow)} some or all of it is slow plain torch."
        return "Every kernel that runs is right."


def main(cfg: DoctorCommand) -> bool:
    """Run `gptoss-ft doctor`: print the report; False if an implementation fails its self-check.

    Raises:
        UserError: if there is no such device, or the report cannot be written.
    """
    devices = devices_of(cfg.device)
    out = Path(cfg.out).absolute() if cfg.out else None
    if out:
        if out.is_dir():
            raise UserError(f"out={cfg.out} is a folder: name a file in it")
        check_writable_parent(out.parent)
    report = examine(devices)
    print(report)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, json.dumps(asdict(report), indent=2) + "\n")
    return not report.failures


def devices_of(name: str | None) -> list[torch.device]:
    """The device of that name, or all."""
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    if name is None:
        return [torch.device("cpu"), *gpus]
    if name == "cpu":
        return [torch.device("cpu")]
    chosen = gpus if name == "cuda" else [gpu for gpu in gpus if str(gpu) == name]
    if not chosen:
        seen = ", ".join(map(str, gpus)) or f"none (its build is {torch.__version__})"
        raise UserError(f"device={name}: torch sees these GPUs: {seen}; choose one or device=cpu")
    return chosen


def examine(devices: list[torch.device]) -> Report:
    """Check and time everything, whatever earlier checks found."""
    check_variables()
    machine = dict(machine_facts())
    for device in devices:
        verdicts.forget(device)
    combinations = [(op, device, dtype) for device in devices for op in dispatch.OPERATIONS for dtype in op.dtypes]
    with tqdm(combinations, leave=False, unit="kernel") as bar:
        rows = []
        for operation, device, dtype in bar:
            bar.set_description(f"{operation.name} on {device} in {short(dtype)}")
            rows.append(examine_operation(operation, device, dtype))
    return Report(machine, rows)


def examine_operation(operation: Operation, device: torch.device, dtype: torch.dtype) -> Row:
    """What runs at gpt-oss-20b's shape, its error at a small one, and its speed."""
    size = GPT_OSS_20B_CPU if device.type == "cpu" else GPT_OSS_20B_GPU
    call = operation.case.call(Draw(device, dtype), size)
    choice = operation.choose(*call.args, **call.kwargs)
    chosen = next((found for found in operation.implementations if found.name == choice.implementation), None)
    if chosen is None:
        small = operation.case.call(Draw(device, dtype), AWKWARD)
        allowed = None
        error = selfcheck.error_of_reference(operation.reference, small, differentiable=operation.differentiable)
    else:
        verdict = operation.verdict(chosen, device, dtype)
        error, allowed = verdict.error, verdict.budget
    work = operation.case.work(size, dtype)
    with torch.no_grad():
        speed = work.amount / best_seconds(lambda: choice.function(*call.args, **call.kwargs), device)
    names = (operation.name, str(device), short(dtype), choice.implementation)
    return Row(*names, error, allowed, speed, work.unit, choice.refused)


def best_seconds(run: Callable[[], object], device: torch.device) -> float:
    """The shortest of several calls after a first one, or that one if it takes long."""

    def seconds() -> float:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    first = seconds()
    if first > MEASURE_SECONDS:
        return first
    times = [seconds()]
    while sum(times) < MEASURE_SECONDS:
        times.append(seconds())
    return min(times)


def machine_facts() -> Iterator[tuple[str, str]]:
    """What decides about speed and results here, by name."""
    yield "python", platform.python_version()
    for package in PACKAGES:
        yield package, torch.__version__ if package == "torch" else version_of(package)
    memory = psutil.virtual_memory()
    yield "cpu", f"{verdicts.cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads in use"
    yield "memory", f"{memory.available / GIB:.1f} GiB available of {memory.total / GIB:.1f}"
    if reason := cpu_library.fault():
        yield "cpu library", reason.removeprefix("the CPU library was ")
    else:
        forced = os.environ.get(cpu_library.ISA_VARIABLE)
        uses = cpu_library.selected_isa() + (f" ({cpu_library.ISA_VARIABLE} forces it)" if forced else "")
        compiled = cpu_library.ISAS if platform.machine() in ("x86_64", "AMD64") else cpu_library.ISAS[:1]
        yield "cpu library", f"built for {', '.join(compiled)}"
        yield "instructions", f"{', '.join(cpu_library.supported_isas())} run here; {uses} is used"
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        name = f"{torch.cuda.get_device_name(index)}, capability {major}.{minor}"
        yield f"cuda:{index}", f"{name}, {free / GIB:.1f} GiB free of {total / GIB:.1f}"
    if not torch.cuda.is_available():
        yield "gpu", "none that torch sees"


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
