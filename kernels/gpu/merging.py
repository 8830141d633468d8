"""Merging low-rank updates on NVIDIA GPUs: `kernels/merging.py` in one launch for all experts, with the same bits.

R LoRA rank · E experts · O out rows · I in columns (32·G) · G blocks of a row
"""

from collections.abc import Collection, Sequence
from types import ModuleType

import torch
from torch import Tensor

from gptoss_ft.kernels.gpu import device
from gptoss_ft.kernels.gpu.launch import ceil_div, launch, on_device
from gptoss_ft.kernels.layout import by_rank
from gptoss_ft.kernels.merging import experts_with_rows
from gptoss_ft.kernels.reference import MXFP4Weight

FACTOR_DTYPES = (torch.bfloat16, torch.float32)
# Rows of one column of blocks, and of the tile of a dense weight.
PACKED_ROWS = 64
DENSE_ROWS, DENSE_COLUMNS = 16, 128


def unavailable(where: torch.device, dtype: torch.dtype) -> str:
    """Why nothing can be merged there with factors of `dtype`; empty if it can."""
    return device.unavailable(where, dtype, FACTOR_DTYPES)


def merge_mxfp4(
    weight: MXFP4Weight,
    A_ERI: Tensor,
    B_EOR: Tensor,
    scaling: float,
    ends_E: Sequence[int] | None = None,
    experts: Collection[int] | None = None,
) -> MXFP4Weight:
    """`merging.merge_mxfp4`."""
    return _merge(weight, A_ERI, B_EOR, scaling, ends_E, experts, dithered=False)


def merge_mxfp4_dithered(
    weight: MXFP4Weight,
    A_ERI: Tensor,
    B_EOR: Tensor,
    scaling: float,
    ends_E: Sequence[int] | None = None,
    experts: Collection[int] | None = None,
) -> MXFP4Weight:
    """`merging.merge_mxfp4_dithered`."""
    return _merge(weight, A_ERI, B_EOR, scaling, ends_E, experts, dithered=True)


def _merge(
    weight: MXFP4Weight,
    A_ERI: Tensor,
    B_EOR: Tensor,
    scaling: float,
    ends_E: Sequence[int] | None,
    experts: Collection[int] | None,
    *,
    dithered: bool,
) -> MXFP4Weight:
    merged = MXFP4Weight(*(torch.empty_like(part) for part in weight))
    used = experts_with_rows(len(A_ERI), ends_E)
    adapted = [expert for expert in used if experts is None or expert in experts]
    for expert in set(used).difference(adapted):
        for part, base in zip(merged, weight, strict=True):
            part[expert] = base[expert]
    E, O, G = weight.scales_EOG.shape
    R = A_ERI.shape[1]
    if not adapted or not O * G:
        return merged
    B_REO = by_rank(B_EOR).float().mul(scaling)
    experts_N = on_device(adapted, A_ERI.device)
    programs = len(adapted) * ceil_div(O, PACKED_ROWS) * G
    arguments = (*weight, A_ERI.float().contiguous(), B_REO, experts_N, *merged, E, R)
    constants = {"O": O, "G": G, "DITHERED": dithered, "O_": PACKED_ROWS}
    launch(_kernels().merge_mxfp4_kernel, programs, *arguments, **constants, enable_fp_fusion=False)
    return merged


def merge_bf16(weight_OI: Tensor, A_RI: Tensor, B_OR: Tensor, scaling: float) -> Tensor:
    """`merging.merge_bf16` of an fp32 or bf16 weight."""
    merged_OI = torch.empty_like(weight_OI)
    O, I = weight_OI.shape
    B_RO = (B_OR.float() * scaling).t().contiguous()
    programs = ceil_div(O, DENSE_ROWS) * ceil_div(I, DENSE_COLUMNS)
    arguments = (weight_OI, A_RI.float().contiguous(), B_RO, merged_OI, len(A_RI))
    constants = {"O": O, "I": I, "O_": DENSE_ROWS, "I_": DENSE_COLUMNS}
    launch(_kernels().merge_bf16_kernel, programs, *arguments, **constants, enable_fp_fusion=False)
    return merged_OI


def _kernels() -> ModuleType:
    # torch for CPUs comes without triton, and refusals must be told there too.
    from gptoss_ft.kernels.gpu import merge_kernels

    return merge_kernels
