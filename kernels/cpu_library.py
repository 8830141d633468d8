"""The compiled CPU kernels (`cpu/`), called through ctypes on the memory of tensors.

The library is built when the package is installed; nothing is compiled here. Products are in `cpu_gemm`.
"""

import ctypes
import hashlib
import os
from collections.abc import Callable
from contextvars import ContextVar
from functools import cache, wraps
from importlib import resources
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from gptoss_ft.kernels.reference import BLOCK_SIZE

LIBRARY_NAME = "libgptoss_ft_cpu.so"
# What the library was built from. It lies here in a checkout, which an editable install runs; wheels have none of it.
SOURCES = Path(__file__).with_name("cpu")
NOT_BUILT = "the CPU library was not built: install gptoss-ft again where g++ or clang is found"
ISA_VARIABLE = "GPTOSS_FT_CPU_ISA"
# In the order of the library's numbers: a processor that runs one runs all before it.
ISAS = ("portable", "avx2", "avx512bf16")
# What it means that a processor lacks one.
MISSING = {
    "avx512bf16": "the processor has no AVX-512 BF16 (AMD has it from Zen 4, Intel's Xeon from Sapphire Rapids): "
    "bf16 is computed by slower fp32 instructions",
    "avx2": "the processor has no AVX2 with FMA: portable code runs, which is slower still",
}
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
# Of a step of generation: tokens, `kFewRows` of cpu/kernels.h, and choices of experts, `kMixtureRows` of cpu/mixture.h.
MAX_TOKENS, MAX_CHOICES = 4, 16

INT, LONG, POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p

P = ParamSpec("P")
R = TypeVar("R")
# The instruction set of the call in progress, where `running_in` chose it.
_chosen_isa: ContextVar[str | None] = ContextVar("isa", default=None)


@cache
def library_file() -> Path | None:
    """The library that was built with this package, or None if there was no compiler for it."""
    found = resources.files("gptoss_ft.kernels").joinpath(LIBRARY_NAME)
    return Path(str(found)) if found.is_file() else None


@cache
def library() -> ctypes.CDLL | None:
    """`library_file`, loaded; None where `fault` has a reason."""
    return None if fault() else ctypes.CDLL(str(library_file()))


@cache
def fault() -> str:
    """Why there is no library that can be called, with the cure; empty if there is one."""
    file = library_file()
    if file is None:
        return NOT_BUILT
    # Functions of other sources may take other arguments: calling one could end the process.
    if SOURCES.is_dir() and digest_in(ctypes.CDLL(str(file))) != digest_of(SOURCES):
        return (
            f"the CPU library was built from other sources than those in {SOURCES}: "
            f"run `pip install -e {SOURCES.parents[1]}` again"
        )
    return ""


def digest_in(loaded: ctypes.CDLL) -> str:
    """`digest_of` the sources that a library was built from; empty if it is too old to say."""
    sources = getattr(loaded, "gptoss_ft_sources", None)
    if sources is None:
        return ""
    sources.argtypes, sources.restype = (), ctypes.c_char_p
    return sources().decode()


def digest_of(folder: Path) -> str:
    """SHA-256 of the names and contents of sources, as cpu/CMakeLists.txt computes it."""
    names = sorted(path.name for pattern in ("*.cpp", "*.h", "CMakeLists.txt") for path in folder.glob(pattern))
    # Editors keep files of their own beside these.
    names = [name for name in names if not name.startswith(".")]
    lines = [f"{name} {hashlib.sha256((folder / name).read_bytes()).hexdigest()}\n" for name in names]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@cache
def function(name: str, *arguments: Any, result: Any = INT) -> Any:
    """A function of the library by its C name and types.

    Raises:
        RuntimeError: if there is no library.
    """
    loaded = library()
    if loaded is None:
        raise RuntimeError(fault())
    found = getattr(loaded, name)
    found.argtypes, found.restype = arguments, result
    return found


@cache
def supported_isas() -> tuple[str, ...]:
    """The instruction sets of the library that this processor has, the best one last."""
    return ISAS[: function("gptoss_ft_best_isa")() + 1]


def selected_isa() -> str:
    """The best instruction set of this processor, or the one that the environment variable GPTOSS_FT_CPU_ISA names.

    Raises:
        ValueError: if the variable names none that runs here.
    """
    supported = supported_isas()
    name = os.environ.get(ISA_VARIABLE) or supported[-1]
    if name not in supported:
        raise ValueError(f"{ISA_VARIABLE}={name}: this processor runs {', '.join(supported)}; unset it or choose one")
    return name


def current_isa() -> str:
    """The instruction set of the call in progress if `running_in` chose one, else `selected_isa`.

    A backward pass comes after its call: it keeps what this was in the forward pass, and runs in the same.
    """
    return _chosen_isa.get() or selected_isa()


def unavailable(isa: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why the library cannot compute by an instruction set on a device in a dtype, or is not to; empty if it can.

    Raises:
        ValueError: as `selected_isa` does.
    """
    if device.type != "cpu":
        return f"it computes on the CPU, not on {device.type}"
    if reason := fault():
        return reason
    if isa not in supported_isas():
        return MISSING[isa]
    if dtype not in DTYPES:
        return f"it computes in fp32 and bf16, not {str(dtype).removeprefix('torch.')}"
    forced = os.environ.get(ISA_VARIABLE)
    if forced and selected_isa() != isa:
        return f"{ISA_VARIABLE}={forced} is set: unset it to have the best one"
    return ""


def running_in(isa: str, function: Callable[P, R]) -> Callable[P, R]:
    """A function of this library in an instruction set of choice, not the selected one."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        token = _chosen_isa.set(isa)
        try:
            return function(*args, **kwargs)
        finally:
            _chosen_isa.reset(token)

    return run


def decode(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """`reference.dequantize_mxfp4` into fp32 or bf16."""
    # Not torch.empty, which a `with torch.device(...)` around the call would send elsewhere.
    out = blocks.new_empty(*scales.shape, BLOCK_SIZE, dtype=dtype)
    args = (blocks.data_ptr(), scales.data_ptr(), scales.numel(), out.data_ptr())
    # isa, threads, dtype, blocks, scales, number of blocks, out
    types = (INT, INT, INT, POINTER, POINTER, LONG, POINTER)
    check(function("gptoss_ft_decode", *types)(*common(dtype), *args))
    return out.flatten(-2)


def register_peak(isa: str, iterations: int) -> int:
    """Run arithmetic that stays in registers on this thread and return the floating-point operations done.

    0 for `portable`, which has no such loop.
    """
    return function("gptoss_ft_register_peak", INT, LONG, result=LONG)(ISAS.index(isa), iterations)


def common(dtype: torch.dtype) -> tuple[int, int, int]:
    """What every kernel takes first: the instruction set, the number of threads and the dtype."""
    return ISAS.index(current_isa()), torch.get_num_threads(), DTYPES[dtype]


def check(status: int) -> None:
    """Raise MemoryError if a kernel reports that it got no scratch space."""
    if status != 0:
        raise MemoryError("no memory for the scratch space of a CPU kernel")
