"""Plain torch for every operation of gpt-oss training: the truth that faster kernels are held to.

Names carry shapes: T rows · K choices per row · E experts · I input features · O output features · R LoRA rank
G blocks of 32 inputs (I = 32·G) · B bytes per block (16) · V vocabulary. Rows are sorted by expert and `ends_E[e]` is
where expert e's rows end, as in `torch.nn.functional.grouped_mm`.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
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


def grouped_dense(x_TI: Tensor, w_EOI: Tensor, bias_EO: Tensor | None, ends_E: Sequence[int]) -> Tensor:
    """`y[t] = x[t] @ W[e(t)].T + b[e(t)]` in the wider dtype of `x` and `W`, returned in that of `x`: `[T, O]`."""
    y_TO = x_TI.new_empty(x_TI.shape[0], w_EOI.shape[1])
    for expert, rows in _row_ranges(ends_E):
        y_TO[rows] = linear(x_TI[rows], w_EOI[expert], None if bias_EO is None else bias_EO[expert])
    return y_TO


def grouped_dense_dx(dy_TO: Tensor, w_EOI: Tensor, ends_E: Sequence[int]) -> Tensor:
    """The gradient of `grouped_dense` with respect to its input, `dy[t] @ W[e(t)]`: `[T, I]`."""
    dx_TI = dy_TO.new_empty(dy_TO.shape[0], w_EOI.shape[2])
    for expert, rows in _row_ranges(ends_E):
        dx_TI[rows] = linear_dx(dy_TO[rows], w_EOI[expert])
    return dx_TI


def linear(x_TI: Tensor, w_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """`grouped_dense` with one weight: `[T, O]`."""
    wide = torch.promote_types(x_TI.dtype, w_OI.dtype)
    return F.linear(x_TI.to(wide), w_OI.to(wide), None if bias_O is None else bias_O.to(wide)).to(x_TI.dtype)


def linear_dx(dy_TO: Tensor, w_OI: Tensor) -> Tensor:
    """`grouped_dense_dx` with one weight: `[T, I]`."""
    wide = torch.promote_types(dy_TO.dtype, w_OI.dtype)
    return (dy_TO.to(wide) @ w_OI.to(wide)).to(dy_TO.dtype)


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


def low_rank_down(
    x_TI: Tensor, factor_ERI: Tensor, ends_E: Sequence[int], experts: Collection[int] | None = None
) -> Tensor:
    """`x[t] @ F[e(t)].T`, and zeros for experts outside `experts` (None: all are in): `[T, R]` in at least fp32."""
    h_TR = x_TI.new_zeros(x_TI.shape[0], factor_ERI.shape[1], dtype=accurate(x_TI.dtype))
    for expert, rows in _adapted(ends_E, experts):
        h_TR[rows] = F.linear(x_TI[rows], factor_ERI[expert].to(x_TI.dtype)).to(h_TR.dtype)
    return h_TR


def low_rank_up_(
    y_TI: Tensor,
    h_TR: Tensor,
    factor_ERI: Tensor,
    scaling: float,
    ends_E: Sequence[int],
    experts: Collection[int] | None = None,
) -> None:
    """Add `scaling · h[t] @ F[e(t)]` to the rows of `y` whose expert is in `experts`, in place."""
    for expert, rows in _adapted(ends_E, experts):
        y_TI[rows] += scaling * (h_TR[rows].to(y_TI.dtype) @ factor_ERI[expert].to(y_TI.dtype))


def low_rank_gradient_(
    d_factor_ERI: Tensor,
    h_TR: Tensor,
    x_TI: Tensor,
    scaling: float,
    ends_E: Sequence[int],
    experts: Collection[int] | None = None,
) -> None:
    """Set `d_factor[e] = scaling · h[rows of e].T @ x[rows of e]`; zero without rows and outside `experts`."""
    d_factor_ERI.zero_()
    for expert, rows in _adapted(ends_E, experts):
        d_factor_ERI[expert] = (scaling * (h_TR[rows].to(x_TI.dtype).T @ x_TI[rows])).to(d_factor_ERI.dtype)


def clamped_swiglu(gate_up: Tensor, *, alpha: float = 1.702, limit: float = 7.0) -> Tensor:
    """gpt-oss's activation of interleaved gate (even) and up (odd) columns, `[..., 2·I] -> [..., I]`."""
    gate, up = gate_up[..., 0::2].clamp(max=limit), gate_up[..., 1::2].clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(alpha * gate)


def weighted_swiglu_backward(
    gate_up_T2I: Tensor, d_z_TI: Tensor, weights_T: Tensor, *, alpha: float = 1.702, limit: float = 7.0
) -> tuple[Tensor, Tensor, Tensor]:
    """`z = weights[:, None] · clamped_swiglu(gate_up)`, again, and the gradients of `gate_up` and `weights`.

    `weights` and its gradient have at least fp32. At the limits the gradient is that of torch's clamp: it passes.
    """
    dtype, wide = gate_up_T2I.dtype, accurate(gate_up_T2I.dtype)
    raw_gate, raw_up = gate_up_T2I[:, 0::2].to(wide), gate_up_T2I[:, 1::2].to(wide)
    gate, up = raw_gate.clamp(max=limit), raw_up.clamp(-limit, limit)
    share = torch.sigmoid(alpha * gate)
    glu = gate * share
    act, d_act = (up + 1) * glu, d_z_TI * weights_T[:, None]
    d_gate = d_act * (up + 1) * (share + alpha * glu * (1 - share)) * (raw_gate <= limit)
    d_up = d_act * glu * (raw_up.abs() <= limit)
    d_gate_up = torch.stack((d_gate, d_up), dim=-1).flatten(1)
    return (act * weights_T[:, None]).to(dtype), d_gate_up.to(dtype), (d_z_TI * act).sum(1)


def combine(y_NI: Tensor, slots_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    """`out[t] = sum of weights[t, k] · y[slots[t, k]]` over k; without weights the plain sum: `[T, I]`."""
    y_TKI = y_NI[slots_TK]
    # A sum over K in one place: no atomic adds, so the result is reproducible.
    return (y_TKI if weights_TK is None else y_TKI * weights_TK[..., None].to(y_NI.dtype)).sum(1)


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
    """The expert block of gpt-oss, from `grouped_linear`, `clamped_swiglu` and `combine`: `[T, H]`."""
    order_N = experts_TK.reshape(-1).argsort(stable=True)
    ends_E = experts_TK.reshape(-1).bincount(minlength=len(down_bias_EH)).cumsum(0).tolist()
    gate_up_NO = grouped_linear(hidden_TH[order_N // experts_TK.shape[1]], gate_up, gate_up_bias_EO, ends_E)
    act_NI = clamped_swiglu(gate_up_NO, alpha=alpha, limit=limit)
    y_NH = grouped_linear(act_NI, down, down_bias_EH, ends_E)
    return combine(y_NH, order_N.argsort().view_as(experts_TK), weights_TK)


def rms_norm(x_TH: Tensor, weight_H: Tensor, epsilon: float) -> Tensor:
    """`weight · x / sqrt(mean of x² + epsilon)` of each row, computed in at least fp32: `[T, H]`."""
    wide = accurate(x_TH.dtype)
    scale_T1 = x_TH.to(wide).square().mean(-1, keepdim=True).add(epsilon).rsqrt()
    return (weight_H.to(wide) * (x_TH.to(wide) * scale_T1)).to(x_TH.dtype)


def attention_inputs(
    x_TI: Tensor,
    query_OI: Tensor,
    query_bias_O: Tensor,
    key_OI: Tensor,
    key_bias_O: Tensor,
    value_OI: Tensor,
    value_bias_O: Tensor,
    cos_TC: Tensor,
    sin_TC: Tensor,
) -> Tensor:
    """Queries, keys and values of every token side by side, heads of 2·C features, the first two rotated: `[T, O]`.

    The rotary embedding turns a head's feature i and feature C + i, for every i below C, as a pair.
    """
    cos_T1C, sin_T1C = cos_TC[:, None], sin_TC[:, None]
    parts = []
    for w_OI, bias_O in ((query_OI, query_bias_O), (key_OI, key_bias_O)):
        heads = linear(x_TI, w_OI, bias_O).unflatten(-1, (-1, 2 * cos_TC.shape[-1]))
        a, b = heads.chunk(2, dim=-1)
        parts.append(torch.cat((a * cos_T1C - b * sin_T1C, b * cos_T1C + a * sin_T1C), dim=-1).flatten(1))
    return torch.cat((*parts, linear(x_TI, value_OI, value_bias_O)), dim=-1)


def accurate(dtype: torch.dtype) -> torch.dtype:
    """The dtype for sums and for what is small: fp32, or fp64 beside fp64."""
    return torch.promote_types(dtype, torch.float32)


class Tree(NamedTuple):
    """Tokens in depth-first order: what grows from a token follows it without a gap.

    Attributes:
        depths_BS: how many tokens lead to each, int `[B, S]`.
        visible_until_BS: the first place behind all that grows from each, from which it is out of sight, `[B, S]`.
    """

    depths_BS: Tensor
    visible_until_BS: Tensor


def sink_attention(
    q_BHTD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    sinks_H: Tensor,
    *,
    scaling: float,
    window: int | None,
    documents_BS: Tensor | None,
    tree: Tree | None = None,
) -> Tensor:
    """gpt-oss's causal attention, differentiable in its first four arguments: `[B, H, T, D]`.

    The sink is a logit of each query head that takes part in the softmax and has no value. Query head h reads
    key/value head h // (H / K). The last T of the S positions are those of the queries. A query sees its own position
    and those before it, `window` in all (None: no limit), which belong to its document: `documents_BS` numbers the
    document of every position (None: one document). A position whose document is negative, as that of padding, sees
    nothing and is not seen; its output is zero. Where documents are trees, a branch does not see its neighbours, and
    `window` counts levels.
    """
    H, T = q_BHTD.shape[1:3]
    K, S = k_BKSD.shape[1:3]
    key_S = torch.arange(S, device=q_BHTD.device)
    query_T1 = key_S[S - T :, None]
    sees_TS = key_S <= query_T1
    if tree is None:
        sees_TS = sees_TS & (key_S > query_T1 - (S if window is None else window))
    else:
        levels_BTS = tree.depths_BS[:, S - T :, None] - tree.depths_BS[:, None]
        sees_TS = (
            sees_TS & (query_T1 < tree.visible_until_BS[:, None]) & (levels_BTS < (S if window is None else window))
        )
    if documents_BS is not None:
        own_BT1 = documents_BS[:, S - T :, None]
        sees_TS = sees_TS & (own_BT1 == documents_BS[:, None]) & (own_BT1 >= 0)
    if sees_TS.ndim == 3:
        sees_TS = sees_TS[:, None, None]
    q_BKGTD = q_BHTD.unflatten(1, (K, H // K))
    logits = (q_BKGTD @ k_BKSD[:, :, None].mT * scaling).masked_fill(~sees_TS, -math.inf)
    sinks = sinks_H.to(logits.dtype).view(K, H // K, 1, 1).expand(*logits.shape[:-1], 1)
    probabilities = torch.cat((logits, sinks), dim=-1).softmax(-1)[..., :-1]
    return (probabilities @ v_BKSD[:, :, None]).flatten(1, 2)


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """The parameters of a layer and its constants. W = N·D is the width of all N query heads, of D features each."""

    input_norm_H: Tensor
    query_OH: Tensor
    query_bias_O: Tensor
    key_OH: Tensor
    key_bias_O: Tensor
    value_OH: Tensor
    value_bias_O: Tensor
    sinks_N: Tensor
    projection_HW: Tensor
    projection_bias_H: Tensor
    norm_H: Tensor
    router_EH: Tensor
    router_bias_E: Tensor
    gate_up: MXFP4Weight
    gate_up_bias_EO: Tensor
    down: MXFP4Weight
    down_bias_EH: Tensor
    head_dim: int
    window: int | None
    scaling: float
    input_epsilon: float
    epsilon: float
    top_k: int
    alpha: float
    limit: float

    @property
    def kv_heads(self) -> int:
        """K, how many heads of keys and of values there are."""
        return len(self.key_bias_O) // self.head_dim

    def tensors(self) -> tuple[Tensor, ...]:
        """All of them."""
        fields = vars(self).values()
        packed = (*self.gate_up, *self.down)
        return (*(value for value in fields if isinstance(value, Tensor)), *packed)


def decoder_layer(
    hidden_BTH: Tensor,
    keys_BKSD: Tensor,
    values_BKSD: Tensor,
    cos_RTC: Tensor,
    sin_RTC: Tensor,
    weights: LayerWeights,
    documents_BS: Tensor | None = None,
) -> Tensor:
    """A whole layer: `[B, T, H]`. The keys and values of its tokens are written to the last T of S positions.

    The rotation is that of every row, `R = B`, or the same for all, `R = 1`; documents are those of `sink_attention`.
    """
    of, B, K = weights, len(hidden_BTH), keys_BKSD.shape[1]
    x_TH = rms_norm(hidden_BTH.flatten(0, 1), of.input_norm_H, of.input_epsilon)
    projections = (of.query_OH, of.query_bias_O, of.key_OH, of.key_bias_O, of.value_OH, of.value_bias_O)
    rotation = (half_RTC.expand(B, -1, -1).flatten(0, 1) for half_RTC in (cos_RTC, sin_RTC))
    states_TO = attention_inputs(x_TH, *projections, *rotation)
    states_BHTD = states_TO.view(*hidden_BTH.shape[:2], -1, of.head_dim).transpose(1, 2)
    query, key, value = states_BHTD.split((states_BHTD.shape[1] - 2 * K, K, K), dim=1)
    keys_BKSD[:, :, -key.shape[2] :], values_BKSD[:, :, -key.shape[2] :] = key, value
    heads_BHTD = sink_attention(
        query, keys_BKSD, values_BKSD, of.sinks_N, scaling=of.scaling, window=of.window, documents_BS=documents_BS
    )
    heads_TW = heads_BHTD.transpose(1, 2).flatten(2).flatten(0, 1)
    hidden_TH = hidden_BTH.flatten(0, 1) + linear(heads_TW, of.projection_HW, of.projection_bias_H)
    x_TH = rms_norm(hidden_TH, of.norm_H, of.epsilon)
    chosen_TK, experts_TK = linear(x_TH, of.router_EH, of.router_bias_E).topk(of.top_k, dim=-1)
    experts = (of.gate_up, of.gate_up_bias_EO, of.down, of.down_bias_EH)
    mixed_TH = expert_mixture(x_TH, experts_TK, chosen_TK.softmax(-1), *experts, alpha=of.alpha, limit=of.limit)
    return (hidden_TH + mixed_TH).view_as(hidden_BTH)


def cross_entropy(logits_TV: Tensor, targets_T: Tensor, weights_T: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy in nats of each row, `[T]`, and the gradient of its weighted sum with respect to the logits.

    Both are in at least fp32 until the gradient is cast to the dtype of the logits.
    """
    logits = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    log_probabilities = logits.log_softmax(-1)
    loss_T = -log_probabilities.gather(1, targets_T[:, None])[:, 0]
    gradient_TV = log_probabilities.exp()
    gradient_TV[torch.arange(len(targets_T), device=targets_T.device), targets_T] -= 1
    return loss_T, (gradient_TV * weights_T[:, None]).to(logits_TV.dtype)


# Columns of a descent whose changes move the gradients of all others together.
DESCENT_COLUMNS = 128


def nearest_element(values: Tensor) -> Tensor:
    """The e2m1 number nearest to each of `values`, at most 6 in magnitude; ties go to even multiples of the spacing."""
    magnitude = values.abs().clamp_max(MAGNITUDES[-1])
    spacing = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return torch.copysign((magnitude / spacing).round() * spacing, values)


def round_columns(wanted_OK: Tensor, target_OK: Tensor, steps_OK: Tensor, spread_KK: Tensor) -> tuple[Tensor, Tensor]:
    """Round to e2m1 times `steps` from left to right, each column's error moving what is wanted of later ones.

    After column k, `wanted[:, j]` of every later j falls by its error times `spread[k, j]`.

    Returns:
        What was rounded and the errors, rounded - target, both [O, K].
    """
    wanted_OK, errors_OK = wanted_OK.clone(), torch.empty_like(wanted_OK)
    for k in range(wanted_OK.shape[1]):
        rounded_O = nearest_element(wanted_OK[:, k] / steps_OK[:, k]) * steps_OK[:, k]
        error_O = rounded_O - target_OK[:, k]
        wanted_OK[:, k + 1 :].addr_(error_O, spread_KK[k, k + 1 :], alpha=-1)
        wanted_OK[:, k], errors_OK[:, k] = rounded_O, error_O
    return wanted_OK, errors_OK


def descend_(
    rounded_OK: Tensor, gradient_OK: Tensor, steps_OK: Tensor, moment_KK: Tensor, max_passes: int
) -> tuple[Tensor, Tensor]:
    """Lower (Q - T) H (Q - T)ᵀ of each row by changing one of its numbers at a time, in place.

    Each becomes the best one of e2m1 times `steps` while all others stay, from left to right and again until none
    changes, or `max_passes` times.

    Args:
        rounded_OK: Q, multiples of `steps` by numbers of e2m1.
        gradient_OK: (Q - T) H, kept up to date.
        moment_KK: H.

    Returns:
        Q and its gradient.
    """
    diagonal_K = moment_KK.diagonal()
    for _ in range(max_passes):
        before_OK = rounded_OK.clone()
        for start in range(0, len(moment_KK), DESCENT_COLUMNS):
            block = slice(start, start + DESCENT_COLUMNS)
            moment_CK = moment_KK[block]
            # What changes in the block moves its own gradient at once, and all others' together.
            gradient_OC = gradient_OK[:, block].clone()
            changes_OC = torch.empty_like(gradient_OC)
            for c in range(len(moment_CK)):
                k = start + c
                wanted_O = rounded_OK[:, k] - gradient_OC[:, c] / diagonal_K[k]
                new_O = nearest_element(wanted_O / steps_OK[:, k]) * steps_OK[:, k]
                changes_OC[:, c] = new_O - rounded_OK[:, k]
                gradient_OC.addr_(changes_OC[:, c], moment_CK[c, block])
                rounded_OK[:, k] = new_O
            gradient_OK.addmm_(changes_OC, moment_CK)
        if torch.equal(before_OK, rounded_OK):
            break
    return rounded_OK, gradient_OK


def check_packed_rows(
    rows: Tensor, weight: MXFP4Weight, ends_E: Sequence[int], *, inputs: bool
) -> tuple[int, int, int]:
    """(E, O, I) of a product of packed weights with `rows`, its inputs `[T, I]` or the gradients of its outputs.

    Raises:
        ValueError: for whatever would make a kernel read or write out of bounds.
    """
    E, O, G, B = weight.blocks_EOGB.shape
    I = G * BLOCK_SIZE
    if weight.scales_EOG.shape != (E, O, G) or B != BLOCK_SIZE // 2:
        blocks, scales = tuple(weight.blocks_EOGB.shape), tuple(weight.scales_EOG.shape)
        raise ValueError(f"blocks {blocks} and scales {scales} are not [E, O, G, 16] and [E, O, G]")
    if any(operand.dtype != torch.uint8 or not operand.is_contiguous() for operand in weight):
        raise ValueError("packed weights must be contiguous uint8")
    if rows.ndim != 2 or rows.shape[1] != (I if inputs else O):
        raise ValueError(f"rows {tuple(rows.shape)} must be [T, {I if inputs else O}]")
    _check_ends(ends_E, E, rows.shape[0])
    return E, O, I


def check_low_rank(
    rows_TI: Tensor, factor_ERI: Tensor, ends_E: Sequence[int], h_TR: Tensor | None = None
) -> tuple[int, int, int, int]:
    """(T, E, R, I) of a product of `rows`, or of `h`, with a stacked factor.

    Raises:
        ValueError: for whatever would make a kernel read or write out of bounds.
    """
    E, R, I = factor_ERI.shape
    T = rows_TI.shape[0]
    if rows_TI.shape != (T, I) or (h_TR is not None and h_TR.shape != (T, R)):
        h = "" if h_TR is None else f"h {tuple(h_TR.shape)}, "
        raise ValueError(f"{h}rows {tuple(rows_TI.shape)} and factor {(E, R, I)} do not fit together")
    _check_ends(ends_E, E, T)
    return T, E, R, I


def _check_ends(ends_E: Sequence[int], E: int, T: int) -> None:
    if len(ends_E) != E or list(ends_E) != sorted(ends_E) or min(ends_E) < 0 or max(ends_E) != T:
        raise ValueError(f"ends_E must be {E} numbers that rise to {T}, not {list(ends_E)}")


def _row_ranges(ends_E: Sequence[int]) -> list[tuple[int, slice]]:
    """(expert, its rows) for every expert that has rows."""
    starts = (0, *ends_E[:-1])
    return [(e, slice(start, end)) for e, (start, end) in enumerate(zip(starts, ends_E, strict=True)) if end > start]


def _adapted(ends_E: Sequence[int], experts: Collection[int] | None) -> list[tuple[int, slice]]:
    return [(e, rows) for e, rows in _row_ranges(ends_E) if experts is None or e in experts]
