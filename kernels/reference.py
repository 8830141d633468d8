"""Plain torch for every operation of gpt-oss training: the truth that faster kernels are held to.

Names carry shapes: T rows · K choices per row · E experts · I input features · O output features · R LoRA rank
G blocks of 32 inputs (I = 32·G) · B bytes per block (16) · V vocabulary. Rows are sorted by expert and `ends_E[e]` is
where expert e's rows end, as in `torch.nn.functional.grouped_mm`.
"""

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK_SIZE = 32
# e2m1: a sign, two bits of exponent and one of mantissa; codes 8 to 15 are the negatives of 0 to 7.
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
ELEMENTS = MAGNITUDES + tuple(-magnitude for magnitude in MAGNITUDES)
# e8m0: byte s stands for 2^(s - 127), and 255 for NaN.
SCALE_BIAS = 127
SCALE_NAN = 255


class MXFP4Weight(NamedTuple):
    """A stack of expert projections as the checkpoint holds it, uint8 throughout."""

    blocks_EOGB: Tensor
    scales_EOG: Tensor


def dequantize_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Expand MXFP4 (OCP MX v1.0) blocks `[..., G, 16]` and scales `[..., G]`, both uint8, to `dtype` `[..., 32·G]`.

    A byte holds two elements, the first in its low nibble. Exact in bf16, fp32 and fp64 wherever the value is
    representable; overflow gives inf, scale 255 gives NaN.

    Raises:
        ValueError: if there is not one scale for each block of 16 bytes.
    """
    if blocks.shape != (*scales.shape, BLOCK_SIZE // 2):
        raise ValueError(f"{tuple(blocks.shape)} blocks do not go with {tuple(scales.shape)} scales")
    # Half precision lacks the scales' range, so it is multiplied in fp32; bf16 products need 2 bits and are exact.
    compute = dtype if dtype in (torch.bfloat16, torch.float32, torch.float64) else torch.float32
    elements = torch.tensor(ELEMENTS, dtype=compute, device=blocks.device)
    # Looking up whole bytes halves the lookups and needs no unpacked copy of the codes.
    pairs = torch.stack((elements.repeat(16), elements.repeat_interleave(16)), dim=-1)
    values = F.embedding(blocks.int(), pairs).flatten(-2)
    values *= scale_values(scales, compute).unsqueeze(-1)
    return values.flatten(-2).to(dtype)


def scale_values(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Scale bytes as numbers, 255 as NaN."""
    # A table, because exp2 need not be exact in fp32.
    table = [math.ldexp(1.0, byte - SCALE_BIAS) for byte in range(SCALE_NAN)] + [math.nan]
    return torch.tensor(table, dtype=dtype, device=scales.device)[scales.int()]


def grouped_linear(x_TI: Tensor, weight: MXFP4Weight, bias_EO: Tensor | None, ends_E: Sequence[int]) -> Tensor:
    """`y[t] = x[t] @ W[e(t)].T + b[e(t)]` with one expert's weights decoded at a time: `[T, O]`."""
    y_TO = x_TI.new_empty(x_TI.shape[0], weight.blocks_EOGB.shape[1])
    for expert, rows in _row_ranges(ends_E):
        w_OI = dequantize_mxfp4(weight.blocks_EOGB[expert], weight.scales_EOG[expert], x_TI.dtype)
        y_TO[rows] = F.linear(x_TI[rows], w_OI, None if bias_EO is None else bias_EO[expert].to(x_TI.dtype))
    return y_TO


def grouped_linear_dx(dy_TO: Tensor, weight: MXFP4Weight, ends_E: Sequence[int]) -> Tensor:
    """The gradient of `grouped_linear` with respect to its input, `dy[t] @ W[e(t)]`: `[T, I]`."""
    dx_TI = dy_TO.new_empty(dy_TO.shape[0], weight.blocks_EOGB.shape[2] * BLOCK_SIZE)
    for expert, rows in _row_ranges(ends_E):
        dx_TI[rows] = dy_TO[rows] @ dequantize_mxfp4(weight.blocks_EOGB[expert], weight.scales_EOG[expert], dy_TO.dtype)
    return dx_TI


def grouped_lora(
    x_TI: Tensor,
    A_ERI: Tensor,
    B_EOR: Tensor,
    scaling: float,
    ends_E: Sequence[int],
    experts: Collection[int] | None = None,
) -> Tensor:
    """`scaling · (x[t] @ A[e].T) @ B[e].T` for each row's expert, differentiable in all three: `[T, O]`.

    The update B·A is never formed. Parameters are cast to the dtype of `x`. Rows of experts outside `experts`
    (None: all of them) get zeros.
    """
    # Cast before anything else: both matrices are far smaller than what they are multiplied with. B comes with the
    # expert as its fastest dimension, in which every product would touch the whole stack: one copy orders it.
    # unbind has one backward for the stack; indexing would allocate a gradient of the whole stack for every expert.
    As, Bs = A_ERI.to(x_TI.dtype).unbind(0), B_EOR.to(x_TI.dtype).contiguous().unbind(0)
    parts = []
    for expert, rows in _row_ranges(ends_E):
        if experts is None or expert in experts:
            parts.append(F.linear(F.linear(x_TI[rows], As[expert]), Bs[expert]))
        else:
            parts.append(x_TI.new_zeros(rows.stop - rows.start, B_EOR.shape[1]))
    if not parts:
        return x_TI.new_zeros(0, B_EOR.shape[1])
    return scaling * torch.cat(parts)


def clamped_swiglu(gate_up: Tensor, *, alpha: float = 1.702, limit: float = 7.0) -> Tensor:
    """gpt-oss's activation of interleaved gate (even) and up (odd) columns, `[..., 2·I] -> [..., I]`."""
    gate, up = gate_up[..., 0::2].clamp(max=limit), gate_up[..., 1::2].clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(alpha * gate)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TI, head_VI, targets_T, weights_T, chunk_size):  # type: ignore[no-untyped-def]
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        accurate = torch.promote_types(hidden_TI.dtype, torch.float32)
        loss = torch.zeros((), dtype=accurate, device=hidden_TI.device)
        d_hidden = torch.empty_like(hidden_TI) if wants_hidden else None
        d_head = torch.zeros_like(head_VI, dtype=accurate) if wants_head else None
        for start in range(0, len(targets_T), chunk_size):
            rows = slice(start, start + chunk_size)
            h, target = hidden_TI[rows], targets_T[rows, None]
            logits = (h @ head_VI.T).to(accurate)
            log_norm = logits.logsumexp(-1, keepdim=True)
            weight = 1 if weights_T is None else weights_T[rows, None].to(accurate)
            loss += ((log_norm - logits.gather(1, target)) * weight).sum()
            if not (wants_hidden or wants_head):
                continue
            d_logits = logits.sub_(log_norm).exp_()
            d_logits.scatter_add_(1, target, -torch.ones_like(log_norm))
            d_logits = (d_logits if weights_T is None else d_logits.mul_(weight)).to(hidden_TI.dtype)
            if d_hidden is not None:
                d_hidden[rows] = d_logits @ head_VI
            if d_head is not None:
                d_head += d_logits.T @ h
        ctx.save_for_backward(d_hidden, None if d_head is None else d_head.to(head_VI.dtype))
        return loss

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        d_hidden, d_head = ctx.saved_tensors
        return (
            None if d_hidden is None else d_hidden * grad.to(d_hidden.dtype),
            None if d_head is None else d_head * grad.to(d_head.dtype),
            None,
            None,
            None,
        )


def chunked_cross_entropy(
    hidden_TI: Tensor,
    head_VI: Tensor,
    targets_T: Tensor,
    chunk_size: int = 256,
    *,
    weights_T: Tensor | None = None,
) -> Tensor:
    """Summed cross entropy in nats of `hidden @ head.T` against `targets`, a scalar in at least fp32.

    Each row's loss is multiplied by its weight if there are any; they get no gradient.
    Only `chunk_size` rows of logits exist at a time; gradients are computed on the way, so the backward pass costs
    nothing more and the logits are never formed again.
    """
    return _ChunkedCrossEntropy.apply(hidden_TI, head_VI, targets_T, weights_T, chunk_size)


def _row_ranges(ends_E: Sequence[int]) -> list[tuple[int, slice]]:
    """(expert, its rows) for every expert that has rows."""
    starts = (0, *ends_E[:-1])
    return [(e, slice(start, end)) for e, (start, end) in enumerate(zip(starts, ends_E, strict=True)) if end > start]
