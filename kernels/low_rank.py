"""LoRA beside frozen products: what it adds to them in the forward pass, and its gradients in the backward one.

E experts · N rows sorted by expert · I in features · O out features · R LoRA rank
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptoss_ft.kernels import dispatch
from gptoss_ft.kernels.layout import by_expert, by_rank


@dataclass(frozen=True)
class LowRank:
    """A LoRA update of a stack of experts, `scaling · B[e] @ A[e]` in the orientation `[out, in]`.

    `experts` limits it to some of them; None means all.
    """

    A_ERI: Tensor
    B_EOR: Tensor
    scaling: float
    experts: frozenset[int] | None = None


def add_updates_(y_NO: Tensor, x_NI: Tensor, updates: Sequence[LowRank], ends_E: Sequence[int]) -> list[Tensor]:
    """Add what `updates` make of the rows `x` to `y`, in place; returns x·A^T of each, `[N, R]` in at least fp32."""
    h = inputs_by_A(x_NI, updates, ends_E)
    for update, h_NR in zip(updates, h, strict=True):
        dispatch.low_rank_up_(y_NO, h_NR, by_rank(update.B_EOR).transpose(0, 1), update.scaling, ends_E, update.experts)
    return h


def inputs_by_A(x_NI: Tensor, updates: Sequence[LowRank], ends_E: Sequence[int]) -> list[Tensor]:
    """x·A^T of each update, `[N, R]` in at least fp32."""
    return [dispatch.low_rank_down(x_NI, update.A_ERI, ends_E, update.experts) for update in updates]


def backward(dy_NO: Tensor, updates: Sequence[LowRank], dx_NI: Tensor | None, ends_E: Sequence[int]) -> list[Tensor]:
    """The gradients of x·A^T of each update, whose parts in the gradient of x are added to `dx`."""
    dh = []
    for update in updates:
        B_ERO = by_rank(update.B_EOR).transpose(0, 1)
        dh.append(dispatch.low_rank_down(dy_NO, B_ERO, ends_E, update.experts).mul_(update.scaling))
        if dx_NI is not None:
            dispatch.low_rank_up_(dx_NI, dh[-1], update.A_ERI, 1.0, ends_E, update.experts)
    return dh


def factor_gradients(
    x_NI: Tensor,
    dy_NO: Tensor,
    updates: Sequence[LowRank],
    h: Sequence[Tensor],
    dh: Sequence[Tensor],
    needs: Sequence[bool],
    ends_E: Sequence[int],
) -> list[Tensor | None]:
    """The gradients of A and B of each update, in turn; None for those that need none."""
    gradients: list[Tensor | None] = []
    for i, update in enumerate(updates):
        dA_ERI = dB_EOR = None
        if needs[2 * i]:
            dA_ERI = torch.empty_like(update.A_ERI, memory_format=torch.contiguous_format)
            dispatch.low_rank_gradient_(dA_ERI, dh[i], x_NI, 1.0, ends_E, update.experts)
        if needs[2 * i + 1]:
            E, O, R = update.B_EOR.shape
            dB_REO = update.B_EOR.new_empty(R, E, O)
            dispatch.low_rank_gradient_(dB_REO.transpose(0, 1), h[i], dy_NO, update.scaling, ends_E, update.experts)
            dB_EOR = by_expert(dB_REO)
        gradients += [dA_ERI, dB_EOR]
    return gradients
