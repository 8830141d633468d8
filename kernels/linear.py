"""A linear layer whose weight stays frozen, as autograd sees it: the gradient of its input and nothing else.

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
