"""Cross entropy over a vocabulary of 201,088 without its logits ever existing at once.

T rows · I hidden size · V vocabulary
"""

from typing import Any

import torch
from torch import Tensor

from gptoss_ft.kernels import dispatch


def chunked_cross_entropy(
    hidden_TI: Tensor,
    head_VI: Tensor,
    targets_T: Tensor,
    weights_T: Tensor | None = None,
    chunk_size: int = 256,
) -> Tensor:
    """Sum of `weights` (None: ones) times the cross entropy in nats of `hidden @ head.T`, a scalar in at least fp32.

    Only `chunk_size` rows of logits exist at a time; gradients are computed on the way, so the backward pass costs
    nothing more and the logits are never formed again.
    """
    if weights_T is None:
        weights_T = torch.ones_like(targets_T, dtype=torch.promote_types(hidden_TI.dtype, torch.float32))
    return _ChunkedCrossEntropy.apply(hidden_TI, head_VI, targets_T, weights_T, chunk_size)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TI: Tensor, head_VI: Tensor, targets_T: Tensor, weights_T: Tensor, chunk_size: int
    ) -> Tensor:
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        accurate = torch.promote_types(hidden_TI.dtype, torch.float32)
        loss = torch.zeros((), dtype=accurate, device=hidden_TI.device)
        d_hidden = torch.empty_like(hidden_TI) if wants_hidden else None
        d_head = torch.zeros_like(head_VI, dtype=accurate) if wants_head else None
        for start in range(0, len(targets_T), chunk_size):
            rows = slice(start, start + chunk_size)
            logits = dispatch.linear(hidden_TI[rows], head_VI, None)
            row_losses, d_logits = dispatch.cross_entropy(logits, targets_T[rows], weights_T[rows])
            loss += (row_losses * weights_T[rows]).sum()
            if d_hidden is not None:
                d_hidden[rows] = dispatch.linear_dx(d_logits, head_VI)
            if d_head is not None:
                d_head += d_logits.T @ hidden_TI[rows]
        ctx.save_for_backward(d_hidden, None if d_head is None else d_head.to(head_VI.dtype))
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        d_hidden, d_head = ctx.saved_tensors
        return (
            None if d_hidden is None else d_hidden * grad.to(d_hidden.dtype),
            None if d_head is None else d_head * grad.to(d_head.dtype),
            None,
            None,
            None,
        )
