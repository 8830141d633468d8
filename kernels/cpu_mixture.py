"""The whole expert block of a few tokens in one call of the compiled library, as a step of generation needs it.

T tokens · K experts per token · E experts · H hidden · I intermediate
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from gptoss_ft.kernels.cpu_library import DTYPES, INT, LONG, MAX_CHOICES, MAX_TOKENS, POINTER, check, common, function
from gptoss_ft.kernels.reference import BLOCK_SIZE, MXFP4Weight

FLOAT = ctypes.c_float


def takes_rows(experts_TK: Tensor) -> bool:
    """Whether so few tokens are multiplied that the kernels wait for the weights."""
    return len(experts_TK) <= MAX_TOKENS and 0 < experts_TK.numel() <= MAX_CHOICES


def refusal(
    hidden_TH: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    gate_up: MXFP4Weight,
    gate_up_bias_EO: Tensor,
    down: MXFP4Weight,
    down_bias_EH: Tensor,
    **_: Any,
) -> str:
    """Why the library does not take these operands; empty if it does."""
    if not takes_rows(experts_TK):
        T, K = experts_TK.shape
        return f"there are {K} choices of {T} tokens, not up to {MAX_CHOICES} of up to {MAX_TOKENS}"
    # A copy would double the memory of the largest tensors there are.
    if any(t.dtype != torch.uint8 or not t.is_contiguous() for t in (*gate_up, *down)):
        return "packed weights are not contiguous uint8"
    if gate_up_bias_EO.dtype != down_bias_EH.dtype or down_bias_EH.dtype not in DTYPES:
        return f"biases are {gate_up_bias_EO.dtype} and {down_bias_EH.dtype}, not both fp32 or both bf16"
    return ""


def expert_mixture(
    hidden_TH: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    gate_up: MXFP4Weight,
    gate_up_bias_EO: Tensor,
    down: MXFP4Weight,
    down_bias_EH: Tensor,
    *,
    alpha: float,
    limit: float,
) -> Tensor:
    """`reference.expert_mixture` of what `takes_rows`, whose routing weights are not rounded to their dtype.

    Raises:
        ValueError: if shapes do not fit together, or an expert is chosen that there is not.
    """
    (T, H), (E, _, G, _), K = hidden_TH.shape, down.blocks_EOGB.shape, experts_TK.shape[-1]
    I = G * BLOCK_SIZE
    _check_shape("weights", weights_TK, T, K)
    _check_shape("experts", experts_TK, T, K)
    check_experts(H, I, E, gate_up, gate_up_bias_EO, down, down_bias_EH)
    chosen_N = [expert for row in experts_TK.tolist() for expert in row]
    if not 0 <= min(chosen_N) <= max(chosen_N) < E:
        raise ValueError(f"experts must be from 0 to {E - 1}, not {min(chosen_N)} to {max(chosen_N)}")
    hidden_TH, weights_TK = hidden_TH.contiguous(), weights_TK.float().contiguous()
    gate_up_bias_EO, down_bias_EH = gate_up_bias_EO.contiguous(), down_bias_EH.contiguous()
    out_TH = hidden_TH.new_empty(T, H)
    # isa, threads, dtype, hidden, experts, weights, T, K
    types = [INT, INT, INT, POINTER, POINTER, POINTER, LONG, LONG]
    # blocks, scales and bias of gate_up and of down, the biases' dtype, E, H, I, alpha, limit, out
    types += (*(POINTER,) * 6, INT, LONG, LONG, LONG, FLOAT, FLOAT, POINTER)
    pointers = (t.data_ptr() for t in (*gate_up, gate_up_bias_EO, *down, down_bias_EH))
    status = function("gptoss_ft_mixture", *types)(
        *common(hidden_TH.dtype),
        hidden_TH.data_ptr(),
        (LONG * len(chosen_N))(*chosen_N),
        weights_TK.data_ptr(),
        T,
        K,
        *pointers,
        DTYPES[down_bias_EH.dtype],
        E,
        H,
        I,
        alpha,
        limit,
        out_TH.data_ptr(),
    )
    check(status)
    return out_TH


def check_experts(
    H: int, I: int, E: int, gate_up: MXFP4Weight, gate_up_bias_EO: Tensor, down: MXFP4Weight, down_bias_EH: Tensor
) -> None:
    """Raise ValueError if weights and biases do not fit together."""
    G = I // BLOCK_SIZE
    for name, weight, bias_EO, shape in (
        ("gate_up", gate_up, gate_up_bias_EO, (E, 2 * I, H // BLOCK_SIZE)),
        ("down", down, down_bias_EH, (E, H, G)),
    ):
        _check_shape(f"blocks of {name}", weight.blocks_EOGB, *shape, BLOCK_SIZE // 2)
        _check_shape(f"scales of {name}", weight.scales_EOG, *shape)
        _check_shape(f"bias of {name}", bias_EO, *shape[:2])
    if H % BLOCK_SIZE:
        raise ValueError(f"{H} features are no multiple of {BLOCK_SIZE}")


def _check_shape(name: str, tensor: Tensor, *shape: int) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} {tuple(tensor.shape)} must be {shape}")
