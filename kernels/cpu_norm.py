"""RMSNorm of few rows in the compiled library. T rows · H features"""

import ctypes

from torch import Tensor

from gptoss_ft.kernels.cpu_library import DTYPES, INT, LONG, MAX_TOKENS, POINTER, check, common, function


def refusal(x_TH: Tensor, weight_H: Tensor, epsilon: float) -> str:
    """Why the library does not take these operands; empty if it does."""
    # For many, several threads are worth waking, as torch does.
    if x_TH.shape[0] > MAX_TOKENS:
        return f"there are {x_TH.shape[0]} rows, more than {MAX_TOKENS}"
    return "" if weight_H.dtype in DTYPES else f"the weight is {weight_H.dtype}, not fp32 or bf16"


def rms_norm(x_TH: Tensor, weight_H: Tensor, epsilon: float) -> Tensor:
    """`reference.rms_norm` of fp32 or bf16 rows.

    Raises:
        ValueError: if shapes do not fit together.
    """
    if x_TH.ndim != 2 or weight_H.shape != x_TH.shape[1:]:
        raise ValueError(f"rows {tuple(x_TH.shape)} and weight {tuple(weight_H.shape)} are not [T, H] and [H]")
    x_TH, weight_H = x_TH.contiguous(), weight_H.contiguous()
    out_TH = x_TH.new_empty(x_TH.shape)
    # isa, threads, dtype, x, weight dtype, weight, T, H, epsilon, out
    types = (INT, INT, INT, POINTER, INT, POINTER, LONG, LONG, ctypes.c_float, POINTER)
    args = (x_TH.data_ptr(), DTYPES[weight_H.dtype], weight_H.data_ptr(), *x_TH.shape, epsilon, out_TH.data_ptr())
    check(function("gptoss_ft_rms_norm", *types)(*common(x_TH.dtype), *args))
    return out_TH
