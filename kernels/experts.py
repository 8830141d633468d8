"""The expert block of gpt-oss over frozen weights, packed MXFP4 or dense, with LoRA beside them.

T tokens · K experts per token · N = T·K rows sorted by expert · E experts · H hidden · I intermediate · R LoRA rank
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptoss_ft.kernels import dispatch, reference
from gptoss_ft.kernels.reference import MXFP4Weight


@dataclass(frozen=True)
class LowRank:
    """A LoRA update of a stack of experts, `scaling · B[e] @ A[e]` in the orientation `[out, in]`.

    `experts` limits it to some of them; None means all.
    """

    A_ERI: Tensor
    B_EOR: Tensor
    scaling: float
    experts: frozenset[int] | None = None


@dataclass(frozen=True)
class ExpertProjection:
    """One stacked projection: frozen weights, packed or dense `[E, in, out]` as transformers keeps them."""

    weight: MXFP4Weight | Tensor
    bias_EO: Tensor
    low_rank: Sequence[LowRank] = ()


def expert_block(
    hidden_TH: Tensor,
    experts_TK: Tensor,
    routing_weights_TK: Tensor,
    gate_up: ExpertProjection,
    down: ExpertProjection,
    *,
    alpha: float,
    limit: float,
) -> Tensor:
    """Route every token through its experts and return their weighted sum, `[T, H]`."""
    num_experts = gate_up.bias_EO.shape[0]
    expert_N = experts_TK.reshape(-1)
    order_N = expert_N.argsort(stable=True)
    # One device synchronisation for the whole block: the reference loops over experts on the host.
    ends_E = expert_N.bincount(minlength=num_experts).cumsum(0).tolist()

    x_NH = hidden_TH[order_N // experts_TK.shape[1]]
    gate_up_N2I = _project(x_NH, gate_up, ends_E)
    act_NI = reference.clamped_swiglu(gate_up_N2I, alpha=alpha, limit=limit)
    y_NH = _project(act_NI, down, ends_E)

    # Back to token order, then a sum over K in one place: no atomic adds, so the result is reproducible.
    y_TKH = y_NH[order_N.argsort()].view(*experts_TK.shape, -1)
    return (y_TKH * routing_weights_TK[..., None].to(y_TKH.dtype)).sum(1)


def _project(x_NI: Tensor, projection: ExpertProjection, ends_E: Sequence[int]) -> Tensor:
    if isinstance(projection.weight, MXFP4Weight):
        y_NO = _PackedLinear.apply(x_NI, *projection.weight, projection.bias_EO, ends_E)
    else:
        y_NO = _dense_linear(x_NI, projection.weight, projection.bias_EO, ends_E)
    for update in projection.low_rank:
        y_NO = y_NO + reference.grouped_lora(x_NI, update.A_ERI, update.B_EOR, update.scaling, ends_E, update.experts)
    return y_NO


class _PackedLinear(torch.autograd.Function):
    """`dispatch.grouped_linear`; only `x` has a gradient, since packed weights and their biases stay frozen."""

    @staticmethod
    def forward(ctx, x_NI, blocks_EOGB, scales_EOG, bias_EO, ends_E):  # type: ignore[no-untyped-def]
        if bias_EO.requires_grad:
            raise ValueError(
                "expert biases cannot be trained beside packed weights: call requires_grad_(False) on them"
            )
        ctx.save_for_backward(blocks_EOGB, scales_EOG)
        ctx.ends_E = ends_E
        return dispatch.grouped_linear(x_NI, MXFP4Weight(blocks_EOGB, scales_EOG), bias_EO, ends_E)

    @staticmethod
    def backward(ctx, dy_NO):  # type: ignore[no-untyped-def]
        weight = MXFP4Weight(*ctx.saved_tensors)
        return dispatch.grouped_linear_dx(dy_NO, weight, ctx.ends_E), None, None, None, None


def _dense_linear(x_NI: Tensor, weight_EIO: Tensor, bias_EO: Tensor, ends_E: Sequence[int]) -> Tensor:
    weights, biases = weight_EIO.unbind(0), bias_EO.unbind(0)
    sizes = [end - start for start, end in zip((0, *ends_E[:-1]), ends_E, strict=True)]
    parts = [torch.addmm(biases[e], x, weights[e]) for e, x in enumerate(x_NI.split(sizes))]
    return torch.cat(parts)
