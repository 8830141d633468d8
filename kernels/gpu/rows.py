"""What the expert block does to single rows on NVIDIA GPUs, each in one launch: activation, its gradients, combination.

T rows, or tokens of K choices · N rows of all choices · I columns
"""

from types import ModuleType

import torch
from torch import Tensor

from gptoss_ft.kernels.gpu import device
from gptoss_ft.kernels.gpu.launch import ceil_div, launch

DTYPES = (torch.bfloat16, torch.float32)
# Columns of a program.
TILE = 1024


def unavailable(where: torch.device, dtype: torch.dtype) -> str:
    """Why these operations cannot run there on rows of `dtype`; empty if they can."""
    return device.unavailable(where, dtype, DTYPES)


def clamped_swiglu(gate_up: Tensor, *, alpha: float = 1.702, limit: float = 7.0) -> Tensor:
    """`reference.clamped_swiglu` of fp32 or bf16.

    Raises:
        ValueError: if there are not as many gates as ups.
    """
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up {tuple(gate_up.shape)} must be [..., 2·I]")
    act = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    programs = ceil_div(act.numel(), TILE)
    arguments = (gate_up.contiguous(), act, act.numel(), float(alpha), float(limit))
    launch(_kernels().clamped_swiglu_kernel, programs, *arguments, N_=TILE)
    return act


def weighted_swiglu_backward(
    gate_up_T2I: Tensor, d_z_TI: Tensor, weights_T: Tensor, *, alpha: float = 1.702, limit: float = 7.0
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.weighted_swiglu_backward` of fp32 or bf16 rows.

    Raises:
        ValueError: if shapes do not fit together.
    """
    T, I = d_z_TI.shape
    if gate_up_T2I.shape != (T, 2 * I) or weights_T.shape != (T,):
        shapes = f"{tuple(gate_up_T2I.shape)}, {tuple(d_z_TI.shape)} and {tuple(weights_T.shape)}"
        raise ValueError(f"gate_up, d_z and weights {shapes} are not [T, 2·I], [T, I] and [T]")
    gate_up_T2I, d_z_TI, weights_T = gate_up_T2I.contiguous(), d_z_TI.contiguous(), weights_T.float().contiguous()
    z_TI, d_gate_up_T2I, d_weights_T = gate_up_T2I.new_empty(T, I), *map(torch.empty_like, (gate_up_T2I, weights_T))
    arguments = (gate_up_T2I, d_z_TI, weights_T, z_TI, d_gate_up_T2I, d_weights_T, float(alpha), float(limit))
    launch(_kernels().weighted_swiglu_backward_kernel, T, *arguments, I=I, I_=TILE)
    return z_TI, d_gate_up_T2I, d_weights_T


def combine(y_NI: Tensor, slots_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    """`reference.combine` of fp32 or bf16 rows; weights are not rounded to their dtype.

    A slot that is no row of `y` gives NaN: to raise for it, the host would have to wait for the GPU.

    Raises:
        ValueError: if shapes do not fit together.
    """
    (T, K), (N, I) = slots_TK.shape, y_NI.shape
    if weights_TK is not None and weights_TK.shape != (T, K):
        raise ValueError(f"weights {tuple(weights_TK.shape)} must be {(T, K)}")
    out_TI = y_NI.new_empty(T, I)
    weights_TK = None if weights_TK is None else weights_TK.contiguous()
    arguments = (y_NI.contiguous(), slots_TK.contiguous(), weights_TK, out_TI, N)
    constants = {"K": K, "I": I, "HAS_WEIGHTS": weights_TK is not None, "I_": TILE}
    launch(_kernels().combine_kernel, T * ceil_div(I, TILE), *arguments, **constants)
    return out_TI


def _kernels() -> ModuleType:
    # torch for CPUs comes without triton, and refusals must be told there too.
    from gptoss_ft.kernels.gpu import row_kernels

    return row_kernels
