"""What surrounds the frozen products of the expert block, in the compiled library: activation, combination and LoRA.

Names, signatures and meaning are those of `reference`; LoRA factors enter in their own dtype, and every sum is fp32 in
an order that no number of threads changes. T rows, sorted by expert, or tokens of K choices · N rows of all choices
E experts · I columns · R LoRA rank
"""

import ctypes
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from gptoss_ft.kernels.cpu_library import DTYPES, INT, LONG, POINTER, check, common, function
from gptoss_ft.kernels.reference import check_low_rank


class _SwiGLU(ctypes.Structure):
    """`struct SwiGLU` of cpu/experts.h."""

    _fields_ = (("rows", LONG), ("columns", LONG), ("alpha", ctypes.c_float), ("limit", ctypes.c_float))


class _Factor(ctypes.Structure):
    """`struct LowRankFactor` of cpu/experts.h."""

    _fields_ = (
        ("data", POINTER),
        *((name, LONG) for name in ("dtype", "expert_stride", "rank_stride")),
        # Typed pointers, because these keep the arrays alive that are assigned to them.
        ("ends", ctypes.POINTER(LONG)),
        ("adapted", ctypes.POINTER(ctypes.c_uint8)),
        *((name, LONG) for name in ("num_experts", "ranks", "columns")),
    )


def clamped_swiglu(gate_up: Tensor, *, alpha: float = 1.702, limit: float = 7.0) -> Tensor:
    """`reference.clamped_swiglu` of fp32 or bf16 rows `[T, 2·I]`."""
    of, gate_up = _swiglu(gate_up, alpha, limit)
    act_TI = gate_up.new_empty(of.rows, of.columns)
    # isa, threads, dtype, shape and constants, gate_up, act
    types = (INT, INT, INT, ctypes.POINTER(_SwiGLU), POINTER, POINTER)
    args = (gate_up.data_ptr(), act_TI.data_ptr())
    check(function("gptoss_ft_swiglu", *types)(*common(gate_up.dtype), of, *args))
    return act_TI


def weighted_swiglu_backward(
    gate_up_T2I: Tensor, d_z_TI: Tensor, weights_T: Tensor, *, alpha: float = 1.702, limit: float = 7.0
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.weighted_swiglu_backward` of fp32 or bf16 rows.

    Raises:
        ValueError: if shapes do not fit together.
    """
    of, gate_up_T2I = _swiglu(gate_up_T2I, alpha, limit)
    if d_z_TI.shape != (of.rows, of.columns) or d_z_TI.dtype != gate_up_T2I.dtype or weights_T.shape != (of.rows,):
        shapes = f"{tuple(gate_up_T2I.shape)}, {tuple(d_z_TI.shape)} and {tuple(weights_T.shape)}"
        raise ValueError(f"gate_up, d_z and weights {shapes} are not [T, 2·I], [T, I] of one dtype and [T]")
    d_z_TI, weights_T = d_z_TI.contiguous(), weights_T.float().contiguous()
    z_TI, d_gate_up_T2I, d_weights_T = (torch.empty_like(t) for t in (d_z_TI, gate_up_T2I, weights_T))
    # isa, threads, dtype, shape and constants, gate_up, d_z, weights, z, d_gate_up, d_weights
    types = (INT, INT, INT, ctypes.POINTER(_SwiGLU), *(POINTER,) * 6)
    args = (t.data_ptr() for t in (gate_up_T2I, d_z_TI, weights_T, z_TI, d_gate_up_T2I, d_weights_T))
    check(function("gptoss_ft_swiglu_backward", *types)(*common(gate_up_T2I.dtype), of, *args))
    return z_TI, d_gate_up_T2I, d_weights_T


def combine(y_NI: Tensor, slots_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    """`reference.combine` of fp32 or bf16 rows; weights are not rounded to their dtype.

    Raises:
        ValueError: if shapes do not fit together, or a slot is no row of `y`.
    """
    (T, K), I = slots_TK.shape, y_NI.shape[1]
    if weights_TK is not None and weights_TK.shape != (T, K):
        raise ValueError(f"weights {tuple(weights_TK.shape)} must be {(T, K)}")
    if slots_TK.numel() and not 0 <= int(slots_TK.min()) <= int(slots_TK.max()) < y_NI.shape[0]:
        raise ValueError(f"slots must be rows of y, 0 to {y_NI.shape[0] - 1}")
    y_NI, slots_TK = y_NI.contiguous(), slots_TK.long().contiguous()
    weights = None if weights_TK is None else weights_TK.float().contiguous()
    out_TI = y_NI.new_empty(T, I)
    # isa, threads, dtype, y, slots, weights, T, K, I, out
    types = (INT, INT, INT, POINTER, POINTER, POINTER, LONG, LONG, LONG, POINTER)
    pointers = (y_NI.data_ptr(), slots_TK.data_ptr(), None if weights is None else weights.data_ptr())
    check(function("gptoss_ft_combine", *types)(*common(y_NI.dtype), *pointers, T, K, I, out_TI.data_ptr()))
    return out_TI


def low_rank_down(
    x_TI: Tensor, factor_ERI: Tensor, ends_E: Sequence[int], experts: Collection[int] | None = None
) -> Tensor:
    """`reference.low_rank_down` of fp32 or bf16 rows.

    Raises:
        ValueError: if shapes or `ends_E` do not fit together.
    """
    x_TI, factor_ERI = x_TI.contiguous(), _columns_contiguous(factor_ERI)
    h_TR = x_TI.new_empty(x_TI.shape[0], factor_ERI.shape[1], dtype=torch.float32)
    factor = _factor(factor_ERI, h_TR, x_TI, ends_E, experts)
    # isa, threads, dtype, factor, x, h
    types = (INT, INT, INT, ctypes.POINTER(_Factor), POINTER, POINTER)
    check(function("gptoss_ft_low_rank_down", *types)(*common(x_TI.dtype), factor, x_TI.data_ptr(), h_TR.data_ptr()))
    return h_TR


def low_rank_up_(
    y_TI: Tensor,
    h_TR: Tensor,
    factor_ERI: Tensor,
    scaling: float,
    ends_E: Sequence[int],
    experts: Collection[int] | None = None,
) -> None:
    """`reference.low_rank_up_` on contiguous fp32 or bf16 rows.

    Raises:
        ValueError: if shapes or `ends_E` do not fit together, or `y` is not contiguous.
    """
    if not y_TI.is_contiguous():
        raise ValueError("y must be contiguous, to be added to in place")
    h_TR, factor_ERI = h_TR.float().contiguous(), _columns_contiguous(factor_ERI)
    factor = _factor(factor_ERI, h_TR, y_TI, ends_E, experts)
    # isa, threads, dtype, factor, h, scaling, y
    types = (INT, INT, INT, ctypes.POINTER(_Factor), POINTER, ctypes.c_float, POINTER)
    args = (factor, h_TR.data_ptr(), scaling, y_TI.data_ptr())
    check(function("gptoss_ft_low_rank_up", *types)(*common(y_TI.dtype), *args))


def low_rank_gradient_(
    d_factor_ERI: Tensor,
    h_TR: Tensor,
    x_TI: Tensor,
    scaling: float,
    ends_E: Sequence[int],
    experts: Collection[int] | None = None,
) -> None:
    """`reference.low_rank_gradient_` from fp32 or bf16 rows into a tensor with contiguous columns.

    Raises:
        ValueError: if shapes or `ends_E` do not fit together, or the columns of `d_factor` are not contiguous.
    """
    if d_factor_ERI.stride(2) != 1:
        raise ValueError("the columns of d_factor must be contiguous, to be written in place")
    h_TR, x_TI = h_TR.float().contiguous(), x_TI.contiguous()
    factor = _factor(d_factor_ERI, h_TR, x_TI, ends_E, experts)
    # isa, threads, dtype, factor, h, x, scaling
    types = (INT, INT, INT, ctypes.POINTER(_Factor), POINTER, POINTER, ctypes.c_float)
    args = (factor, h_TR.data_ptr(), x_TI.data_ptr(), scaling)
    check(function("gptoss_ft_low_rank_gradient", *types)(*common(x_TI.dtype), *args))


def _swiglu(gate_up_T2I: Tensor, alpha: float, limit: float) -> tuple[_SwiGLU, Tensor]:
    if gate_up_T2I.ndim != 2 or gate_up_T2I.shape[1] % 2:
        raise ValueError(f"gate_up {tuple(gate_up_T2I.shape)} must be [T, 2·I]")
    return _SwiGLU(gate_up_T2I.shape[0], gate_up_T2I.shape[1] // 2, alpha, limit), gate_up_T2I.contiguous()


def _columns_contiguous(factor_ERI: Tensor) -> Tensor:
    return factor_ERI if factor_ERI.stride(2) == 1 else factor_ERI.contiguous()


def _factor(
    factor_ERI: Tensor, h_TR: Tensor, x_TI: Tensor, ends_E: Sequence[int], experts: Collection[int] | None
) -> _Factor:
    _, E, R, I = check_low_rank(x_TI, factor_ERI, ends_E, h_TR)
    adapted = None if experts is None else (ctypes.c_uint8 * E)(*(e in experts for e in range(E)))
    strides = factor_ERI.stride()[:2]
    ends = (LONG * E)(*ends_E)
    return _Factor(factor_ERI.data_ptr(), DTYPES[factor_ERI.dtype], *strides, ends, adapted, E, R, I)
