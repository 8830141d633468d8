"""What follows attention in a layer, for few tokens, in one call of the compiled library.

T tokens · W width of all heads · H hidden · I intermediate · E experts
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from gptoss_ft.kernels import cpu_mixture
from gptoss_ft.kernels.cpu_library import DTYPES, INT, LONG, POINTER, check, common, function
from gptoss_ft.kernels.cpu_mixture import MAX_ROWS, MAX_TOKENS
from gptoss_ft.kernels.reference import BLOCK_SIZE, MXFP4Weight

FLOAT = ctypes.c_float


def refusal(
    heads_TW: Tensor,
    residual_TH: Tensor,
    projection_HW: Tensor,
    projection_bias_H: Tensor,
    norm_H: Tensor,
    router_EH: Tensor,
    router_bias_E: Tensor,
    gate_up: MXFP4Weight,
    gate_up_bias_EO: Tensor,
    down: MXFP4Weight,
    down_bias_EH: Tensor,
    *,
    top_k: int,
    **_: Any,
) -> str:
    """Why the library does not take these operands; empty if it does."""
    T = len(heads_TW)
    if not 0 < T <= MAX_TOKENS or T * top_k > MAX_ROWS:
        return f"there are {top_k} choices of {T} tokens, not up to {MAX_ROWS} of up to {MAX_TOKENS}"
    pairs = (projection_HW, router_EH), (projection_bias_H, router_bias_E), (gate_up_bias_EO, down_bias_EH)
    if any(one.dtype != other.dtype or one.dtype not in DTYPES for one, other in pairs) or norm_H.dtype not in DTYPES:
        return "weights or biases are not fp32 or bf16, or not all alike"
    if residual_TH.dtype != heads_TW.dtype:
        return f"the residual is {residual_TH.dtype} and the heads are {heads_TW.dtype}"
    if any(t.dtype != torch.uint8 for t in (*gate_up, *down)):
        return "packed weights are not uint8"
    # A copy would double the memory of the largest tensors there are.
    kept = (norm_H, *(t for pair in pairs for t in pair), *gate_up, *down)
    return "" if all(t.is_contiguous() for t in kept) else "weights or biases are not contiguous"


def layer_output(
    heads_TW: Tensor,
    residual_TH: Tensor,
    projection_HW: Tensor,
    projection_bias_H: Tensor,
    norm_H: Tensor,
    router_EH: Tensor,
    router_bias_E: Tensor,
    gate_up: MXFP4Weight,
    gate_up_bias_EO: Tensor,
    down: MXFP4Weight,
    down_bias_EH: Tensor,
    *,
    epsilon: float,
    top_k: int,
    alpha: float,
    limit: float,
) -> Tensor:
    """`reference.layer_output` of what `refusal` lets pass.

    Of experts with equal logits the first ones are chosen; torch promises no order of them.

    Raises:
        ValueError: if shapes do not fit together, or there are fewer experts than are to be chosen.
    """
    (T, W), H, (E, _, G, _) = heads_TW.shape, residual_TH.shape[-1], down.blocks_EOGB.shape
    I = G * BLOCK_SIZE
    for name, tensor, shape in (
        ("residual", residual_TH, (T, H)),
        ("projection", projection_HW, (H, W)),
        ("bias of the projection", projection_bias_H, (H,)),
        ("norm", norm_H, (H,)),
        ("router", router_EH, (E, H)),
        ("bias of the router", router_bias_E, (E,)),
    ):
        if tensor.shape != shape:
            raise ValueError(f"{name} {tuple(tensor.shape)} must be {shape}")
    cpu_mixture.check_experts(H, I, E, gate_up, gate_up_bias_EO, down, down_bias_EH)
    if not 0 < top_k <= E:
        raise ValueError(f"{top_k} of {E} experts cannot be chosen")
    heads_TW, residual_TH = heads_TW.contiguous(), residual_TH.contiguous()
    out_TH = residual_TH.new_empty(T, H)
    # isa, threads, dtype, heads, residual, T, top_k, dtype of projection and router, both, dtype of their biases, both
    types = [INT, INT, INT, POINTER, POINTER, LONG, LONG, INT, POINTER, POINTER, INT, POINTER, POINTER]
    # dtype of the norm, its weight, epsilon; blocks, scales and bias of gate_up and of down, the biases' dtype
    types += [INT, POINTER, FLOAT, *(POINTER,) * 6, INT]
    # E, W, H, I, alpha, limit, out
    types += [LONG, LONG, LONG, LONG, FLOAT, FLOAT, POINTER]
    status = function("gptoss_ft_layer_output", *types)(
        *common(heads_TW.dtype),
        heads_TW.data_ptr(),
        residual_TH.data_ptr(),
        T,
        top_k,
        DTYPES[projection_HW.dtype],
        projection_HW.data_ptr(),
        router_EH.data_ptr(),
        DTYPES[projection_bias_H.dtype],
        projection_bias_H.data_ptr(),
        router_bias_E.data_ptr(),
        DTYPES[norm_H.dtype],
        norm_H.data_ptr(),
        epsilon,
        *(t.data_ptr() for t in (*gate_up, gate_up_bias_EO, *down, down_bias_EH)),
        DTYPES[down_bias_EH.dtype],
        E,
        W,
        H,
        I,
        alpha,
        limit,
        out_TH.data_ptr(),
    )
    check(status)
    return out_TH
