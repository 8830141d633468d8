"""Whether Triton kernels for NVIDIA GPUs run on a device."""

import importlib.util
import os
import shutil
from collections.abc import Collection
from functools import cache

import torch

# GPUs before Ampere have no bf16 tensor cores; compiled for them, our products spill thousands of registers.
LEAST_CAPABILITY = (8, 0)


def unavailable(device: torch.device, dtype: torch.dtype, dtypes: Collection[torch.dtype]) -> str:
    """Why Triton kernels for `dtypes` cannot run on a device in one dtype, for the user; empty if they can."""
    return unsuitable(device, dtype, dtypes) or _lacks_compiler()


def unsuitable(device: torch.device, dtype: torch.dtype, dtypes: Collection[torch.dtype]) -> str:
    """`unavailable`, but for what Triton needs."""
    if dtype not in dtypes:
        computed, asked = (", ".join(str(each).removeprefix("torch.") for each in some) for some in (dtypes, (dtype,)))
        return f"the GPU kernels compute in {computed}, not {asked}"
    return _lacks(device)


@cache
def _lacks(device: torch.device) -> str:
    if device.type != "cuda":
        return f"the GPU kernels are for NVIDIA GPUs, not {device.type}"
    if torch.version.hip is not None:
        return "the GPU kernels are for NVIDIA GPUs, and this torch is built for AMD's"
    if not torch.cuda.is_available():
        return "torch finds no NVIDIA GPU that it can use"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        found, least = (".".join(map(str, version)) for version in (capability, LEAST_CAPABILITY))
        return f"{torch.cuda.get_device_name(device)} has compute capability {found}; the GPU kernels need {least}"
    return ""


# It looks for files, and every call of every operation asks.
@cache
def _lacks_compiler() -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (on Linux, torch for CUDA brings it)"
    if not os.environ.get("CC") and not any(map(shutil.which, ("clang", "gcc"))):
        return "triton needs a C compiler: install gcc, or name one in the variable CC"
    return ""
