"""The operations of gpt-oss training, each with the implementations that may run it, fastest first.

The functions have the names, signatures and meaning of `reference`. To add one: its case in `cases`, its function in
`reference`, and an `Operation` here.
"""

from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from gptoss_ft.kernels import cases, cpu_library, reference
from gptoss_ft.kernels.reference import BLOCK_SIZE, MXFP4Weight
from gptoss_ft.kernels.registry import Implementation, Operation

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


dequantize_mxfp4 = Operation(
    reference.dequantize_mxfp4,
    _library(cpu_library.decode, _refuses_blocks),
    cases.DEQUANTIZE_MXFP4,
    exact=True,
)
grouped_linear = Operation(
    reference.grouped_linear,
    _library(cpu_library.grouped_linear, _refuses_packed),
    cases.GROUPED_LINEAR,
)
grouped_linear_dx = Operation(
    reference.grouped_linear_dx,
    _library(cpu_library.grouped_linear_dx, _refuses_packed),
    cases.GROUPED_LINEAR_DX,
)

OPERATIONS: tuple[Operation, ...] = (dequantize_mxfp4, grouped_linear, grouped_linear_dx)
