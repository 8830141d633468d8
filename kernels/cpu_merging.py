"""Merging low-rank updates in the compiled library; see `merging` for what every bit of the results is."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from gptoss_ft.kernels.cpu_library import DTYPES, INT, ISAS, LONG, POINTER, check, current_isa, function
from gptoss_ft.kernels.layout import by_rank
from gptoss_ft.kernels.merging import experts_with_rows
from gptoss_ft.kernels.reference import MXFP4Weight


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
    B_REO = by_rank(B_EOR).float().mul(scaling)
    numbers = torch.tensor(adapted, dtype=torch.int64)
    # isa, threads, dithered, blocks and scales of the base, A, B, expert numbers, how many of them, experts, rows,
    # groups, rank, and the results
    call = function("gptoss_ft_merge_mxfp4", INT, INT, INT, *5 * (POINTER,), *5 * (LONG,), POINTER, POINTER)
    A_ERI = A_ERI.float().contiguous()
    operands = [tensor.data_ptr() for tensor in (*weight, A_ERI, B_REO, numbers)]
    results = [part.data_ptr() for part in merged]
    isa, threads = ISAS.index(current_isa()), torch.get_num_threads()
    check(call(isa, threads, int(dithered), *operands, len(adapted), E, O, G, R, *results))
    return merged


def merge_bf16(weight_OI: Tensor, A_RI: Tensor, B_OR: Tensor, scaling: float) -> Tensor:
    """`merging.merge_bf16`."""
    merged_OI = torch.empty_like(weight_OI)
    A_RI, B_OR = A_RI.float().contiguous(), B_OR.float().contiguous() * scaling
    # isa, threads, dtype, base, A, B, rows, columns, rank, result
    call = function("gptoss_ft_merge_bf16", INT, INT, INT, *3 * (POINTER,), *3 * (LONG,), POINTER)
    operands = [tensor.data_ptr() for tensor in (weight_OI, A_RI, B_OR)]
    isa, threads, dtype = ISAS.index(current_isa()), torch.get_num_threads(), DTYPES[weight_OI.dtype]
    check(call(isa, threads, dtype, *operands, *weight_OI.shape, len(A_RI), merged_OI.data_ptr()))
    return merged_OI


def refuses_mxfp4(weight: MXFP4Weight, A_ERI: Tensor, B_EOR: Tensor, *_: object) -> str:
    """Why the library cannot take these operands; empty if it can."""
    if any(part.dtype != torch.uint8 or not part.is_contiguous() for part in weight):
        return "packed weights are not contiguous uint8"
    E, O, G = weight.scales_EOG.shape
    R = A_ERI.shape[1]
    return _refuses_factors(A_ERI, B_EOR, (E, R, 32 * G), (E, O, R))


def refuses_bf16(weight_OI: Tensor, A_RI: Tensor, B_OR: Tensor, *_: object) -> str:
    """Why the library cannot take these operands; empty if it can."""
    if weight_OI.dtype not in DTYPES or not weight_OI.is_contiguous():
        return "the weight is not contiguous fp32 or bf16"
    (O, I), R = weight_OI.shape, len(A_RI)
    return _refuses_factors(A_RI, B_OR, (R, I), (O, R))


def _refuses_factors(A: Tensor, B: Tensor, A_shape: tuple[int, ...], B_shape: tuple[int, ...]) -> str:
    if not {A.dtype, B.dtype} <= DTYPES.keys():
        return "factors are not fp32 or bf16"
    # The reference says what is wrong with them.
    return "" if (A.shape, B.shape) == (A_shape, B_shape) and A_shape[-2] else "the factors do not fit the weight"
