"""Which implementation runs for an operation on packed experts, and why.

The functions have the names, signatures and meaning of `reference`. Whatever the compiled library cannot do runs
there, and `describe` says so.
"""

import logging
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from gptoss_ft.kernels import cpu_gemm, cpu_library, cpu_loss, cpu_rounding, reference
from gptoss_ft.kernels.reference import BLOCK_SIZE, MXFP4Weight

OPERATIONS = ("dequantize_mxfp4", "grouped_linear", "grouped_linear_dx")

log = logging.getLogger(__name__)


class Choice(NamedTuple):
    """`refused` says why a faster implementation than this one does not run; empty if this is the fastest."""

    implementation: str
    refused: str = ""


class Row(NamedTuple):
    operation: str
    device: str
    dtype: str
    implementation: str
    refused: str


def grouped_linear(x_TI: Tensor, weight: MXFP4Weight, bias_EO: Tensor | None, ends_E: Sequence[int]) -> Tensor:
    """`reference.grouped_linear` in the fastest implementation that can compute it."""
    operands = (x_TI, *weight) if bias_EO is None else (x_TI, *weight, bias_EO)
    if _runs_in_library(x_TI.dtype, weight, operands):
        return cpu_gemm.grouped_linear(x_TI, weight, bias_EO, ends_E)
    return reference.grouped_linear(x_TI, weight, bias_EO, ends_E)


def grouped_linear_dx(dy_TO: Tensor, weight: MXFP4Weight, ends_E: Sequence[int]) -> Tensor:
    """`reference.grouped_linear_dx` in the fastest implementation that can compute it."""
    if _runs_in_library(dy_TO.dtype, weight, (dy_TO, *weight)):
        return cpu_gemm.grouped_linear_dx(dy_TO, weight, ends_E)
    return reference.grouped_linear_dx(dy_TO, weight, ends_E)


def dequantize_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """`reference.dequantize_mxfp4` in the fastest implementation that can compute it, with the same bits."""
    fits = blocks.shape == (*scales.shape, BLOCK_SIZE // 2)
    if fits and _runs_in_library(dtype, MXFP4Weight(blocks, scales), (blocks, scales)):
        return cpu_library.decode(blocks, scales, dtype)
    return reference.dequantize_mxfp4(blocks, scales, dtype)


def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """`torch.nn.functional.linear`."""
    if x_TI.dtype in cpu_library.DTYPES:
        return cpu_gemm.linear(x_TI, weight_OI, bias_O)
    return torch.nn.functional.linear(x_TI, weight_OI, bias_O)


def linear_dx(dy_TO: Tensor, weight_OI: Tensor) -> Tensor:
    """The gradient of `linear` with respect to its input."""
    if dy_TO.dtype in cpu_library.DTYPES:
        return cpu_gemm.linear_dx(dy_TO, weight_OI)
    return dy_TO @ weight_OI


def cross_entropy(logits_TV: Tensor, targets_T: Tensor, weights_T: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.cross_entropy`; the logits may be overwritten."""
    if logits_TV.dtype in cpu_library.DTYPES:
        return cpu_loss.cross_entropy(logits_TV, targets_T, weights_T)
    return reference.cross_entropy(logits_TV, targets_T, weights_T)


def round_columns(
    wanted_OK: Tensor, steps_OK: Tensor, spread_KK: Tensor, old_OK: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`reference.round_columns`."""
    if cpu_rounding.refusal(wanted_OK, steps_OK, spread_KK, old_OK):
        return reference.round_columns(wanted_OK, steps_OK, spread_KK, old_OK)
    return cpu_rounding.round_columns(wanted_OK, steps_OK, spread_KK, old_OK)


def choose(device: torch.device, dtype: torch.dtype) -> Choice:
    """The implementation for contiguous tensors of `dtype` on `device`."""
    if device.type != "cpu":
        return Choice("torch", f"no kernels for {device.type} yet")
    if dtype not in cpu_library.DTYPES:
        return Choice("torch", f"the CPU library computes in bf16 and fp32, not {_name(dtype)}")
    if cpu_library.library() is None:
        return Choice("torch", "the CPU library was not built: no C++ compiler when gptoss-ft was installed")
    return Choice(f"cpu/{cpu_library.selected_isa()}")


def describe(devices: Sequence[torch.device] = (torch.device("cpu"),)) -> list[Row]:
    """One row for every operation, device and dtype of training."""
    return [
        Row(operation, str(device), _name(dtype), *choose(device, dtype))
        for operation in OPERATIONS
        for device in devices
        for dtype in (torch.bfloat16, torch.float32)
    ]


def _runs_in_library(dtype: torch.dtype, weight: MXFP4Weight, operands: Sequence[Tensor]) -> bool:
    refused = choose(operands[0].device, dtype).refused or _refusal(weight, operands)
    if refused:
        _log_once(f"packed experts run in plain torch, many times slower: {refused}")
    return not refused


def _refusal(weight: MXFP4Weight, operands: Sequence[Tensor]) -> str:
    """Why the library cannot take these tensors in particular; empty if it can."""
    if any(operand.device.type != "cpu" for operand in operands):
        return "operands are on different devices"
    if any(operand.dtype != torch.uint8 or not operand.is_contiguous() for operand in weight):
        # A copy would double the memory of the largest tensors there are.
        return "packed weights are not contiguous uint8"
    if weight.blocks_EOGB.ndim == 4 and weight.blocks_EOGB.shape[1] % BLOCK_SIZE:
        return f"{weight.blocks_EOGB.shape[1]} output features are no multiple of {BLOCK_SIZE}"
    if torch.is_grad_enabled() and any(operand.requires_grad for operand in operands):
        return "autograd is recording, and the library's results would have no gradient"
    return ""


@cache
def _log_once(message: str) -> None:
    log.warning(message)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
