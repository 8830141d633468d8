"""Linear layers whose weight stays frozen, as autograd sees them: alone, with LoRA beside it or merged into it.

torch's own bf16 products on a CPU without bf16 arithmetic reach a hundredth of what the same CPU does in fp32, the
backward one least of all; `dispatch` knows better ones.

T rows · I in features · O out features · R LoRA rank
"""

from typing import Any

import torch
from torch import Tensor

from gptoss_ft.kernels import dispatch, low_rank
from gptoss_ft.kernels.low_rank import LowRank


def frozen_linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, `[..., I] -> [..., O]`, with a gradient for `x` alone."""
    # What autograd adds to a call is more than a step of generation spends on a small product.
    product = _FrozenLinear.apply if torch.is_grad_enabled() else dispatch.linear
    y_TO = product(x.reshape(-1, x.shape[-1]), weight_OI, bias_O)
    return y_TO.view(*x.shape[:-1], -1)


def adapted_linear(
    x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, A_RI: Tensor, B_OR: Tensor, scaling: float
) -> Tensor:
    """`frozen_linear` plus `scaling · x @ A.T @ B.T`, with gradients for `x`, A and B, which may have another dtype.

    Between the passes only x·A^T is kept beside the arguments, `[T, R]` in at least fp32.
    """
    y_TO = _AdaptedLinear.apply(x.reshape(-1, x.shape[-1]), weight_OI, bias_O, A_RI, B_OR, scaling)
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


class _AdaptedLinear(torch.autograd.Function):
    """LoRA is that of a stack of one expert, to which all rows belong."""

    @staticmethod
    def forward(
        ctx: Any, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, A_RI: Tensor, B_OR: Tensor, scaling: float
    ) -> Tensor:
        y_TO = dispatch.linear(x_TI, weight_OI, bias_O)
        (h_TR,) = low_rank.add_updates_(y_TO, x_TI, [LowRank(A_RI[None], B_OR[None], scaling)], [len(x_TI)])
        ctx.save_for_backward(x_TI, weight_OI, A_RI, B_OR, h_TR)
        ctx.scaling = scaling
        return y_TO

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_TO: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, weight_OI, A_RI, B_OR, h_TR = ctx.saved_tensors
        needs_x, _, _, *needs_factors, _ = ctx.needs_input_grad
        updates, ends = [LowRank(A_RI[None], B_OR[None], ctx.scaling)], [len(x_TI)]
        dy_TO = dy_TO.contiguous()
        dx_TI = dispatch.linear_dx(dy_TO, weight_OI) if needs_x else None
        dh = low_rank.backward(dy_TO, updates, dx_TI, ends)
        dA, dB = low_rank.factor_gradients(x_TI, dy_TO, updates, [h_TR], dh, needs_factors, ends)
        return dx_TI, None, None, None if dA is None else dA[0], None if dB is None else dB[0], None


def merged_linear(
    x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, A_RI: Tensor, B_OR: Tensor, scaling: float
) -> Tensor:
    """`frozen_linear` with the weight that `merge_bf16` makes, and gradients for A and B as if it did not round."""
    y_TO = _MergedLinear.apply(x.reshape(-1, x.shape[-1]), weight_OI, bias_O, A_RI, B_OR, scaling)
    return y_TO.view(*x.shape[:-1], -1)


class _MergedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TI, weight_OI, bias_O, A_RI, B_OR, scaling):
        merged_OI = dispatch.merge_bf16(weight_OI, A_RI, B_OR, scaling)
        ctx.save_for_backward(x_TI, merged_OI, A_RI, B_OR)
        ctx.scaling = scaling
        return dispatch.linear(x_TI, merged_OI, bias_O)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy_TO):
        x_TI, merged_OI, A_RI, B_OR = ctx.saved_tensors
        needs_x, _, _, *needs_factors, _ = ctx.needs_input_grad
        updates, ends = [LowRank(A_RI[None], B_OR[None], ctx.scaling)], [len(x_TI)]
        dy_TO = dy_TO.contiguous()
        dx_TI = dispatch.linear_dx(dy_TO, merged_OI) if needs_x else None
        # The update's own products: the gradient of the whole weight is never formed.
        h, dh = low_rank.inputs_by_A(x_TI, updates, ends), low_rank.backward(dy_TO, updates, None, ends)
        dA, dB = low_rank.factor_gradients(x_TI, dy_TO, updates, h, dh, needs_factors, ends)
        return dx_TI, None, None, None if dA is None else dA[0], None if dB is None else dB[0], None


def merged_weight(weight_OI: Tensor, A_RI: Tensor, B_OR: Tensor, scaling: float) -> Tensor:
    """`merge_bf16` with gradients for A and B as if it did not round; for weights so small that theirs may be whole."""
    return _MergedWeight.apply(weight_OI, A_RI, B_OR, scaling)


class _MergedWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight_OI, A_RI, B_OR, scaling):
        ctx.save_for_backward(A_RI, B_OR)
        ctx.scaling = scaling
        return dispatch.merge_bf16(weight_OI, A_RI, B_OR, scaling)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_weight_OI):
        A_RI, B_OR = ctx.saved_tensors
        d_weight_OI = d_weight_OI.to(A_RI.dtype) * ctx.scaling
        return None, B_OR.t() @ d_weight_OI, d_weight_OI @ A_RI.t(), None
