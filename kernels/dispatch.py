"""The operations of gpt-oss training, each with the implementations that may run it, fastest first.

The functions have the names, signatures and meaning of `reference` and `merging`. To add one: its case in `cases`, its
function in one of these, and an `Operation` here.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from gptoss_ft.kernels import (
    cases,
    cpu_attention,
    cpu_decoder_layer,
    cpu_experts,
    cpu_few_rows,
    cpu_gemm,
    cpu_library,
    cpu_loss,
    cpu_merging,
    cpu_mixture,
    cpu_norm,
    cpu_rounding,
    flex_attention,
    merging,
    reference,
)
from gptoss_ft.kernels.gpu import dense_experts, packed_experts
from gptoss_ft.kernels.gpu import low_rank as gpu_low_rank
from gptoss_ft.kernels.gpu import merging as gpu_merging
from gptoss_ft.kernels.gpu import rows as gpu_rows
from gptoss_ft.kernels.reference import BLOCK_SIZE, MXFP4Weight
from gptoss_ft.kernels.registry import Implementation, Operation, short

P = ParamSpec("P")
R = TypeVar("R")

# The fused kernels in each of their tiles, and decoding with grouped_mm: GPTOSS_FT_FUSED_ROWS chooses among them.
FEW_AND_MANY_ROWS = (
    cases.AWKWARD,
    *(replace(cases.AWKWARD, rows_E=rows) for rows in ((40, 0, 57), (130, 0, 150))),
)
FUSED_AND_DECODED = tuple(
    partial(packed_experts.fusing_under, rows) for rows in (packed_experts.ALWAYS, packed_experts.NEVER)
)
# LoRA's factors in the dtype of the rows and in fp32. gpt-oss's features are multiples of 16, for which Triton compiles
# other code than for odd ones.
FACTORS = (cases.ODD, replace(cases.AWKWARD, factors=torch.float32))
# LoRA's kernels in each of their tiles, and with sums in parts.
RANKS_AND_PARTS = (
    *FACTORS,
    *(replace(size, rows_E=(40, 0, 57), rank=70) for size in FACTORS),
    *(replace(size, rows_E=(450,), inputs=3 * size.inputs) for size in FACTORS),
)
# Rows of one tile of columns and of several.
FEW_AND_MANY_COLUMNS = (cases.ODD, replace(cases.ODD, outputs=2 * 1100))


def _library(
    function: Callable[P, R], refusal: Callable[..., str], check_sizes: tuple[cases.Size, ...] = (cases.AWKWARD,)
) -> tuple[Implementation[P, R], ...]:
    """A function of the CPU library in each of its instruction sets."""
    return tuple(
        Implementation(
            name=f"cpu/{isa}",
            function=cpu_library.running_in(isa, function),
            device_type="cpu",
            unavailable=partial(cpu_library.unavailable, isa),
            refusal=refusal,
            check_sizes=check_sizes,
        )
        for isa in reversed(cpu_library.ISAS)
    )


def _triton(
    function: Callable[P, R],
    unavailable: Callable[[torch.device, torch.dtype], str],
    refusal: Callable[..., str],
    check_sizes: tuple[cases.Size, ...] = (cases.AWKWARD,),
    check_in: tuple[Callable[[], AbstractContextManager[None]], ...] = (nullcontext,),
) -> Implementation[P, R]:
    return Implementation("triton", function, "cuda", unavailable, refusal, check_sizes, check_in)


def _grouped_mm(function: Callable[P, R], refusal: Callable[..., str]) -> Implementation[P, R]:
    sizes = (replace(cases.AWKWARD, bias=False),)
    return Implementation("grouped_mm", function, "cuda", dense_experts.unavailable, refusal, sizes)


def _are_bytes(blocks: Tensor, scales: Tensor) -> bool:
    return blocks.dtype == scales.dtype == torch.uint8 and blocks.is_contiguous() and scales.is_contiguous()


def _refuses_strided(rows: Tensor, weight: MXFP4Weight, *_: object) -> str:
    # A copy would double the memory of the largest tensors there are.
    return "" if _are_bytes(*weight) else "packed weights are not contiguous uint8"


def _refuses_packed(rows: Tensor, weight: MXFP4Weight, *rest: object) -> str:
    if weight.blocks_EOGB.ndim == 4 and weight.blocks_EOGB.shape[1] % BLOCK_SIZE:
        return f"{weight.blocks_EOGB.shape[1]} output features are no multiple of {BLOCK_SIZE}"
    return _refuses_strided(rows, weight, *rest)


def _refuses_blocks(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> str:
    if not _are_bytes(blocks, scales):
        return "blocks and scales are not contiguous uint8"
    # The reference says what is wrong with them.
    return "" if blocks.shape == (*scales.shape, BLOCK_SIZE // 2) else "there is not one scale for each block"


def _refuses_dense(rows: Tensor, weight: Tensor, *_: object) -> str:
    if weight.dtype not in cpu_library.DTYPES:
        return f"weights are {short(weight.dtype)}, not fp32 or bf16"
    # A copy would double their memory.
    return "" if weight.is_contiguous() and weight.numel() else "weights are empty or not contiguous"


def _refuses_dtypes(*args: object, **_: object) -> str:
    floats = [operand for operand in args if isinstance(operand, Tensor) and operand.is_floating_point()]
    wrong = [operand.dtype for operand in floats if operand.dtype not in cpu_library.DTYPES]
    return f"an operand is {short(wrong[0])}, not fp32 or bf16" if wrong else ""


dequantize_mxfp4 = Operation(
    reference.dequantize_mxfp4,
    (
        _triton(packed_experts.dequantize_mxfp4, packed_experts.dequantize_unavailable, _refuses_blocks),
        *_library(cpu_library.decode, _refuses_blocks),
    ),
    cases.DEQUANTIZE_MXFP4,
    exact=True,
)
grouped_linear = Operation(
    reference.grouped_linear,
    (
        _triton(
            packed_experts.grouped_linear,
            packed_experts.unavailable,
            _refuses_strided,
            FEW_AND_MANY_ROWS,
            FUSED_AND_DECODED,
        ),
        *_library(cpu_gemm.grouped_linear, _refuses_packed),
    ),
    cases.GROUPED_LINEAR,
)
grouped_linear_dx = Operation(
    reference.grouped_linear_dx,
    (
        _triton(
            packed_experts.grouped_linear_dx,
            packed_experts.unavailable,
            _refuses_strided,
            FEW_AND_MANY_ROWS,
            FUSED_AND_DECODED,
        ),
        *_library(cpu_gemm.grouped_linear_dx, _refuses_packed),
    ),
    cases.GROUPED_LINEAR_DX,
)
grouped_dense = Operation(
    reference.grouped_dense,
    (
        _grouped_mm(dense_experts.grouped_dense, dense_experts.refusal),
        *_library(cpu_gemm.grouped_dense, _refuses_dense, (cases.ODD,)),
    ),
    cases.GROUPED_DENSE,
)
grouped_dense_dx = Operation(
    reference.grouped_dense_dx,
    (
        _grouped_mm(dense_experts.grouped_dense_dx, dense_experts.refuses_dx),
        *_library(cpu_gemm.grouped_dense_dx, _refuses_dense, (cases.ODD,)),
    ),
    cases.GROUPED_DENSE_DX,
)
linear = Operation(
    reference.linear,
    _library(cpu_gemm.linear, _refuses_dense, (cases.ODD, replace(cases.ODD, rows_E=(3,)))),
    cases.LINEAR,
    torch_on=("cuda",),
)
linear_dx = Operation(
    reference.linear_dx,
    _library(cpu_gemm.linear_dx, _refuses_dense, (cases.ODD,)),
    cases.LINEAR_DX,
    torch_on=("cuda",),
)
clamped_swiglu = Operation(
    reference.clamped_swiglu,
    (
        _triton(gpu_rows.clamped_swiglu, gpu_rows.unavailable, _refuses_dtypes, FEW_AND_MANY_COLUMNS),
        *_library(cpu_experts.clamped_swiglu, _refuses_dtypes, (cases.ODD,)),
    ),
    cases.CLAMPED_SWIGLU,
)
weighted_swiglu_backward = Operation(
    reference.weighted_swiglu_backward,
    (
        _triton(gpu_rows.weighted_swiglu_backward, gpu_rows.unavailable, _refuses_dtypes, FEW_AND_MANY_COLUMNS),
        *_library(cpu_experts.weighted_swiglu_backward, _refuses_dtypes, (cases.ODD,)),
    ),
    cases.WEIGHTED_SWIGLU_BACKWARD,
)
combine = Operation(
    reference.combine,
    (
        _triton(gpu_rows.combine, gpu_rows.unavailable, _refuses_dtypes, FEW_AND_MANY_COLUMNS),
        *_library(cpu_experts.combine, _refuses_dtypes, (cases.ODD,)),
    ),
    cases.COMBINE,
)
expert_mixture = Operation(
    reference.expert_mixture, _library(cpu_mixture.expert_mixture, cpu_mixture.refusal), cases.EXPERT_MIXTURE
)
rms_norm = Operation(reference.rms_norm, _library(cpu_norm.rms_norm, cpu_norm.refusal, (cases.ODD,)), cases.RMS_NORM)
attention_inputs = Operation(
    reference.attention_inputs,
    _library(cpu_few_rows.attention_inputs, cpu_few_rows.refusal, (cases.ODD,)),
    cases.ATTENTION_INPUTS,
)
decoder_layer = Operation(
    reference.decoder_layer,
    _library(cpu_decoder_layer.decoder_layer, cpu_decoder_layer.refusal, (replace(cases.AWKWARD, inputs=96),)),
    cases.DECODER_LAYER,
)
low_rank_down = Operation(
    reference.low_rank_down,
    (
        _triton(gpu_low_rank.low_rank_down, gpu_low_rank.unavailable, _refuses_dtypes, RANKS_AND_PARTS),
        *_library(cpu_experts.low_rank_down, _refuses_dtypes, FACTORS),
    ),
    cases.LOW_RANK_DOWN,
)
low_rank_up_ = Operation(
    reference.low_rank_up_,
    (
        _triton(gpu_low_rank.low_rank_up_, gpu_low_rank.unavailable, _refuses_dtypes, RANKS_AND_PARTS),
        *_library(cpu_experts.low_rank_up_, _refuses_dtypes, FACTORS),
    ),
    cases.LOW_RANK_UP_,
)
low_rank_gradient_ = Operation(
    reference.low_rank_gradient_,
    (
        _triton(gpu_low_rank.low_rank_gradient_, gpu_low_rank.unavailable, _refuses_dtypes, RANKS_AND_PARTS),
        *_library(cpu_experts.low_rank_gradient_, _refuses_dtypes, FACTORS),
    ),
    cases.LOW_RANK_GRADIENT_,
)
cross_entropy = Operation(
    reference.cross_entropy, _library(cpu_loss.cross_entropy, _refuses_dtypes, (cases.ODD,)), cases.CROSS_ENTROPY
)
sink_attention = Operation(
    reference.sink_attention,
    (
        Implementation(
            "flex_attention",
            flex_attention.sink_attention,
            "cuda",
            flex_attention.unavailable,
            flex_attention.refusal,
            check_sizes=(cases.ODD,),
            poisoned=False,
        ),
        *_library(cpu_attention.sink_attention, cpu_attention.refusal, (cases.ODD,)),
    ),
    cases.SINK_ATTENTION,
    differentiable=True,
)
round_columns = Operation(
    reference.round_columns,
    _library(cpu_rounding.round_columns, cpu_rounding.refusal),
    cases.ROUND_COLUMNS,
    dtypes=(torch.float32,),
)
descend_ = Operation(
    reference.descend_,
    _library(cpu_rounding.descend_, cpu_rounding.descent_refusal, (cases.ODD,)),
    cases.DESCEND_,
    dtypes=(torch.float32,),
)
merge_mxfp4 = Operation(
    merging.merge_mxfp4,
    (
        _triton(gpu_merging.merge_mxfp4, gpu_merging.unavailable, cpu_merging.refuses_mxfp4),
        *_library(cpu_merging.merge_mxfp4, cpu_merging.refuses_mxfp4),
    ),
    cases.MERGE_MXFP4,
    exact=True,
)
merge_mxfp4_dithered = Operation(
    merging.merge_mxfp4_dithered,
    (
        _triton(gpu_merging.merge_mxfp4_dithered, gpu_merging.unavailable, cpu_merging.refuses_mxfp4),
        *_library(cpu_merging.merge_mxfp4_dithered, cpu_merging.refuses_mxfp4),
    ),
    cases.MERGE_MXFP4,
    exact=True,
)
merge_bf16 = Operation(
    merging.merge_bf16,
    (
        _triton(gpu_merging.merge_bf16, gpu_merging.unavailable, cpu_merging.refuses_bf16, FACTORS),
        *_library(cpu_merging.merge_bf16, cpu_merging.refuses_bf16, FACTORS),
    ),
    cases.MERGE_BF16,
    exact=True,
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
    expert_mixture,
    rms_norm,
    attention_inputs,
    decoder_layer,
    low_rank_down,
    low_rank_up_,
    low_rank_gradient_,
    sink_attention,
    cross_entropy,
    round_columns,
    descend_,
    merge_mxfp4,
    merge_mxfp4_dithered,
    merge_bf16,
)
