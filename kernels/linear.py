"""Linear layers whose weight stays frozen, as autograd sees them: alone, or with a low-rank update merged into it.

torch's own bf16 products on a CPU without bf16 arithmetic reach a hundredth of what the same CPU does in fp32, the
backward one least of all; `dispatch` knows better ones.
"""

from typing import Any

import torch
from torch import Tensor

from gptoss_ft.kernels import dispatch


def frozen_linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, `[..., I] -> [..., O]`, with a gradient for `x` alone."""
    y_TO = _FrozenLinear.apply(x.reshape(-1, x.shape[-1]), weight_OI, bias_O)
    return y_TO.view(*x.shape[:-1], -1)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight_OI)
        return dispatch.linear(x_TI, weight_OI, bias_O)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_TO: Tensor) -> tuple[Tensor, None, None]:
        (weight_OI,) = ctx.saved_tensors
        return dispatch.linear_dx(dy_TO, weight_OI), None, None


def merged_linear(
    x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, A_RI: Tensor, B_OR: Tensor, scaling: float
) -> Tensor:
    """`frozen_linear` with the weight that `merge_bf16` makes, and gradients for A and B as if it did not round."""
    y_TO = _MergedLinear.apply(x.reshape(-1, x.shape[-1]), weight_OI, bias_O, A_RI, B_OR, scaling)
    return y_TO.view(*x.shape[:-1], -1)


class _MergedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TI, weight_OI, bias_O, A_RI, B_OR, scaling):  # type: ignore[no-untyped-def]
        merged_OI = dispatch.merge_bf16(weight_OI, A_RI, B_OR, scaling)
        ctx.save_for_backward(x_TI, merged_OI, A_RI, B_OR)
        ctx.scaling = scaling
        return dispatch.linear(x_TI, merged_OI, bias_O)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy_TO):  # type: ignore[no-untyped-def]
        x_TI, merged_OI, A_RI, B_OR = ctx.saved_tensors
        rows = [len(x_TI)]
        B_RO = B_OR.t().contiguous()
        # The update's own products: the gradient of the whole weight is never formed.
        h_TR = dispatch.low_rank_down(x_TI, A_RI[None], rows)
        dh_TR = dispatch.low_rank_down(dy_TO, B_RO[None], rows).mul_(ctx.scaling)
        dA_RI, dB_RO = torch.empty_like(A_RI), torch.empty_like(B_RO)
        dispatch.low_rank_gradient_(dA_RI[None], dh_TR, x_TI, 1.0, rows)
        dispatch.low_rank_gradient_(dB_RO[None], h_TR, dy_TO, ctx.scaling, rows)
        dx_TI = dispatch.linear_dx(dy_TO, merged_OI) if ctx.needs_input_grad[0] else None
        return dx_TI, None, None, dA_RI, dB_RO.t(), None


def merged_weight(weight_OI: Tensor, A_RI: Tensor, B_OR: Tensor, scaling: float) -> Tensor:
    """`merge_bf16` with gradients for A and B as if it did not round; for weights so small that theirs may be whole."""
    return _MergedWeight.apply(weight_OI, A_RI, B_OR, scaling)


class _MergedWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight_OI, A_RI, B_OR, scaling):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(A_RI, B_OR)
        ctx.scaling = scaling
        return dispatch.merge_bf16(weight_OI, A_RI, B_OR, scaling)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_weight_OI):  # type: ignore[no-untyped-def]
        A_RI, B_OR = ctx.saved_tensors
        d_weight_OI = d_weight_OI.to(A_RI.dtype) * ctx.scaling
        return None, B_OR.t() @ d_weight_OI, d_weight_OI @ A_RI.t(), None
