"""The operations of gpt-oss training, each with the implementations that may run it, fastest first.

The functions have the names, signatures and meaning of `reference`. To add one: its case in `cases`, its function in
`reference`, and an `Operation` here.
"""

from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from gptoss_ft.kernels import (
    cases,
    cpu_attention,
    cpu_experts,
    cpu_gemm,
    cpu_library,
    cpu_loss,
    cpu_rounding,
    reference,
)
from gptoss_ft.kernels.reference import BLOCK_SIZE, MXFP4Weight
from gptoss_ft.kernels.registry import Implementation, Operation, short

P = ParamSpec("P")
R = TypeVar("R")


def _library(function: Callable[P, R], refusal: Callable[..., str]) -> tuple[Implementation[P, R], ...]:
    """A function of the CPU library in each of its instruction sets."""
    return tuple(
        Implementation(
            name=f"cpu/{isa}",
            function=cpu_library.running_in(isa, function),
            device_type="cpu",
            unavailable=partial(cpu_library.unavailable, isa),
            refusal=refusal,
        )
        for isa in reversed(cpu_library.ISAS)
    )


def _are_bytes(blocks: Tensor, scales: Tensor) -> bool:
    return blocks.dtype == scales.dtype == torch.uint8 and blocks.is_contiguous() and scales.is_contiguous()


def _refuses_packed(rows: Tensor, weight: MXFP4Weight, *_: object) -> str:
    if not _are_bytes(*weight):
        # A copy would double the memory of the largest tensors there are.
        return "packed weights are not contiguous uint8"
    if weight.blocks_EOGB.ndim == 4 and weight.blocks_EOGB.shape[1] % BLOCK_SIZE:
        return f"{weight.blocks_EOGB.shape[1]} output features are no multiple of {BLOCK_SIZE}"
    return ""


def _refuses_blocks(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> str:
    if not _are_bytes(blocks, scales):
        return "blocks and scales are not contiguous uint8"
    # The reference says what is wrong with them.
    return "" if blocks.shape == (*scales.shape, BLOCK_SIZE // 2) else "there is not one scale for each block"


def _refuses_dense(rows: Tensor, w_EOI: Tensor, *_: object) -> str:
    if w_EOI.dtype not in cpu_library.DTYPES:
        return f"weights are {short(w_EOI.dtype)}, not fp32 or bf16"
    if not w_EOI.is_contiguous() or 0 in w_EOI.shape:
        return "weights are not contiguous, or empty"
    return ""


def _refuses_factors(*args: object) -> str:
    if any(isinstance(operand, Tensor) and operand.dtype not in ROWS_OR_INDICES for operand in args):
        return "LoRA factors and rows are not all bf16 or fp32"
    return ""


def _never(*_: object, **__: object) -> str:
    return ""


ROWS_OR_INDICES = (*cpu_library.DTYPES, torch.int64, torch.int32)

dequantize_mxfp4 = Operation(
    reference.dequantize_mxfp4, _library(cpu_library.decode, _refuses_blocks), cases.DEQUANTIZE_MXFP4, exact=True
)
grouped_linear = Operation(
    reference.grouped_linear, _library(cpu_gemm.grouped_linear, _refuses_packed), cases.GROUPED_LINEAR
)
grouped_linear_dx = Operation(
    reference.grouped_linear_dx, _library(cpu_gemm.grouped_linear_dx, _refuses_packed), cases.GROUPED_LINEAR_DX
)
grouped_dense = Operation(
    reference.grouped_dense, _library(cpu_gemm.grouped_dense, _refuses_dense), cases.GROUPED_DENSE
)
grouped_dense_dx = Operation(
    reference.grouped_dense_dx, _library(cpu_gemm.grouped_dense_dx, _refuses_dense), cases.GROUPED_DENSE_DX
)
linear = Operation(reference.linear, _library(cpu_gemm.linear, _refuses_dense), cases.LINEAR)
linear_dx = Operation(reference.linear_dx, _library(cpu_gemm.linear_dx, _refuses_dense), cases.LINEAR_DX)
clamped_swiglu = Operation(reference.clamped_swiglu, _library(cpu_experts.clamped_swiglu, _never), cases.CLAMPED_SWIGLU)
weighted_swiglu_backward = Operation(
    reference.weighted_swiglu_backward,
    _library(cpu_experts.weighted_swiglu_backward, _never),
    cases.WEIGHTED_SWIGLU_BACKWARD,
)
combine = Operation(reference.combine, _library(cpu_experts.combine, _never), cases.COMBINE)
low_rank_down = Operation(
    reference.low_rank_down, _library(cpu_experts.low_rank_down, _refuses_factors), cases.LOW_RANK_DOWN
)
low_rank_up_ = Operation(
    reference.low_rank_up_, _library(cpu_experts.low_rank_up_, _refuses_factors), cases.LOW_RANK_UP_
)
low_rank_gradient_ = Operation(
    reference.low_rank_gradient_,
    _library(cpu_experts.low_rank_gradient_, _refuses_factors),
    cases.LOW_RANK_GRADIENT_,
)
sink_attention = Operation(
    reference.sink_attention,
    _library(cpu_attention.sink_attention, cpu_attention.refusal),
    cases.SINK_ATTENTION,
    differentiable=True,
)
cross_entropy = Operation(reference.cross_entropy, _library(cpu_loss.cross_entropy, _never), cases.CROSS_ENTROPY)
round_columns = Operation(
    reference.round_columns, _library(cpu_rounding.round_columns, cpu_rounding.refusal), cases.ROUND_COLUMNS
)

OPERATIONS: tuple[Operation, ...] = (
    dequantize_mxfp4,
    grouped_linear,
    grouped_linear_dx,
    grouped_dense,
    grouped_dense_dx,
    linear,
    linear_dx,
    clamped_swiglu,
    weighted_swiglu_backward,
    combine,
    low_rank_down,
    low_rank_up_,
    low_rank_gradient_,
    sink_attention,
    cross_entropy,
    round_columns,
)
