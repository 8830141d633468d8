"""gpt-oss's sink attention with gradients, in the fastest implementation that can compute it.

B batch · H query heads · K key/value heads · T queries · S keys · D head dimension
"""

import logging
from functools import cache

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from gptoss_ft.kernels import cpu_attention, dispatch, reference

log = logging.getLogger(__name__)


def sink_attention(
    q_BHTD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    sinks_H: Tensor,
    *,
    scaling: float,
    window: int | None,
    documents_BS: Tensor | None,
) -> Tensor:
    """`reference.sink_attention`; the library keeps only the output and one number per row for the backward pass."""
    refused = dispatch.choose(q_BHTD.device, q_BHTD.dtype).refused
    refused = refused or cpu_attention.refusal(q_BHTD, k_BKSD, v_BKSD, sinks_H, scaling=scaling)
    if refused:
        _log_once(f"attention runs in plain torch, with memory quadratic in the length: {refused}")
        return reference.sink_attention(
            q_BHTD, k_BKSD, v_BKSD, sinks_H, scaling=scaling, window=window, documents_BS=documents_BS
        )
    return _LibraryAttention.apply(q_BHTD, k_BKSD, v_BKSD, sinks_H, scaling, window, documents_BS)


class _LibraryAttention(Function):
    @staticmethod
    def forward(ctx, q_BHTD, k_BKSD, v_BKSD, sinks_H, scaling, window, documents_BS):  # type: ignore[no-untyped-def]
        out_BHTD, lse_BHT = cpu_attention.sink_attention_forward(
            q_BHTD, k_BKSD, v_BKSD, sinks_H, scaling=scaling, window=window, documents_BS=documents_BS
        )
        ctx.save_for_backward(q_BHTD, k_BKSD, v_BKSD, sinks_H, out_BHTD, lse_BHT, documents_BS)
        ctx.scaling, ctx.window = scaling, window
        return out_BHTD

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out_BHTD):  # type: ignore[no-untyped-def]
        *operands, documents_BS = ctx.saved_tensors
        gradients = cpu_attention.sink_attention_backward(
            d_out_BHTD, *operands, scaling=ctx.scaling, window=ctx.window, documents_BS=documents_BS
        )
        return *gradients, None, None, None


@cache
def _log_once(message: str) -> None:
    log.warning(message)
