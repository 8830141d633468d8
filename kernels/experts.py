"""The expert block of gpt-oss over frozen weights, packed MXFP4 or dense, with LoRA beside them.

T tokens · K experts per token · N = T·K rows sorted by expert · E experts · H hidden · I intermediate · R LoRA rank
O out features of a projection
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gptoss_ft.kernels import cpu_mixture, dispatch, low_rank, reference
from gptoss_ft.kernels.low_rank import LowRank
from gptoss_ft.kernels.reference import MXFP4Weight


@dataclass(frozen=True)
class ExpertProjection:
    """One stacked projection: frozen weights, packed or dense `[E, in, out]` as transformers keeps them.

    With `merged`, products see what `merge_mxfp4_dithered` makes of the packed weights and their one update, instead of
    both beside each other; gradients go straight through its rounding.

    Raises:
        ValueError: if there is not one update to merge, or the weights are not packed.
    """

    weight: MXFP4Weight | Tensor
    bias_EO: Tensor
    low_rank: Sequence[LowRank] = ()
    merged: bool = False

    def __post_init__(self) -> None:
        if self.merged and (len(self.low_rank) != 1 or not isinstance(self.weight, MXFP4Weight)):
            raise ValueError(f"one update of packed weights can be merged, not {len(self.low_rank)} or of dense ones")


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
    """Route every token through its experts and return their weighted sum, `[T, H]`.

    Differentiable once in the hidden states, the routing weights and the LoRA factors. Between the passes are kept,
    beside the arguments, only the sort order `[N]`, the gate_up projection before its activation `[N, 2·I]`, and x·A^T
    of each update `[N, R]` in fp32; of merged updates instead the bytes that were multiplied, the size of the packed
    weights. Dense weights and biases may be trained too; autograd then keeps what it likes.

    Raises:
        ValueError: if the biases of packed weights require a gradient.
    """
    step = _is_step_of_generation(hidden_TH, experts_TK, routing_weights_TK, gate_up, down)
    if step and isinstance(gate_up.weight, MXFP4Weight) and isinstance(down.weight, MXFP4Weight):
        return dispatch.expert_mixture(
            hidden_TH,
            experts_TK,
            routing_weights_TK,
            gate_up.weight,
            gate_up.bias_EO,
            down.weight,
            down.bias_EO,
            alpha=alpha,
            limit=limit,
        )
    order_N, ends_E = _sort_by_expert(experts_TK, gate_up)
    constants = _Constants(ends_E, alpha, limit)
    if _trains_weights(gate_up) or _trains_weights(down):
        return _autograd_block(hidden_TH, routing_weights_TK, order_N, gate_up, down, constants)
    forms, tensors = zip(*(_disassemble(projection) for projection in (gate_up, down)), strict=True)
    return _ExpertBlock.apply(hidden_TH, routing_weights_TK, order_N, constants, forms, *tensors[0], *tensors[1])


def expert_inputs(
    hidden_TH: Tensor, experts_TK: Tensor, gate_up: ExpertProjection, *, alpha: float, limit: float
) -> tuple[Tensor, Tensor, list[int]]:
    """What `expert_block` multiplies by its two weights; not differentiable.

    Returns:
        The rows `[N, H]` and `[N, I]` that enter gate_up and down, and where each expert's rows end.
    """
    order_N, ends_E = _sort_by_expert(experts_TK, gate_up)
    x_NH = hidden_TH.index_select(0, order_N // experts_TK.shape[1])
    _, act_NI, _ = _activate(x_NH, _as_multiplied(gate_up, ends_E), _Constants(ends_E, alpha, limit))
    return x_NH, act_NI, ends_E


class _Constants(NamedTuple):
    ends_E: Sequence[int]
    alpha: float
    limit: float


class _Form(NamedTuple):
    """An `ExpertProjection` without its tensors."""

    num_frozen: int  # blocks, scales and bias, or dense weights and bias
    updates: tuple[tuple[float, frozenset[int] | None], ...]
    merged: bool

    @property
    def num_kept(self) -> int:
        """How many x·A^T the forward pass leaves to the backward pass."""
        return 0 if self.merged else len(self.updates)

    @property
    def num_tensors(self) -> int:
        return self.num_frozen + 2 * len(self.updates)


def _disassemble(projection: ExpertProjection) -> tuple[_Form, list[Tensor]]:
    """What `_assemble` takes: the tensors are weights, bias, and A and B of each update."""
    weight = projection.weight
    frozen = [*(weight if isinstance(weight, MXFP4Weight) else (weight,)), projection.bias_EO]
    factors = [factor for update in projection.low_rank for factor in (update.A_ERI, update.B_EOR)]
    updates = tuple((update.scaling, update.experts) for update in projection.low_rank)
    return _Form(len(frozen), updates, projection.merged), frozen + factors


def _assemble(form: _Form, tensors: Sequence[Tensor]) -> ExpertProjection:
    *weight, bias_EO = tensors[: form.num_frozen]
    factors = tensors[form.num_frozen :]
    pairs = zip(factors[0::2], factors[1::2], form.updates, strict=True)
    return ExpertProjection(
        MXFP4Weight(*weight) if len(weight) == 2 else weight[0],
        bias_EO,
        [LowRank(A, B, *rest) for A, B, rest in pairs],
        form.merged,
    )


def _as_multiplied(projection: ExpertProjection, ends_E: Sequence[int]) -> ExpertProjection:
    """The projection with its update in the weights of the experts that have rows, if it is to be merged."""
    if not projection.merged:
        return projection
    (update,) = projection.low_rank
    assert isinstance(projection.weight, MXFP4Weight)
    weight = dispatch.merge_mxfp4_dithered(
        projection.weight, update.A_ERI, update.B_EOR, update.scaling, ends_E, update.experts
    )
    return replace(projection, weight=weight)


class _ExpertBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TH, routing_TK, order_N, constants, forms, *tensors):
        ends_E, (gate_up_form, down_form), K = constants.ends_E, forms, routing_TK.shape[1]
        gate_up = _as_multiplied(_assemble(gate_up_form, tensors[: gate_up_form.num_tensors]), ends_E)
        down = _as_multiplied(_assemble(down_form, tensors[gate_up_form.num_tensors :]), ends_E)

        gate_up_N2I, act_NI, h_gate_up = _activate(hidden_TH.index_select(0, order_N // K), gate_up, constants)
        y_NH, h_down = _project(act_NI, down, ends_E)

        # The weights that were multiplied, for the backward pass is to multiply by no others.
        multiplied = *_disassemble(gate_up)[1], *_disassemble(down)[1]
        ctx.save_for_backward(hidden_TH, routing_TK, order_N, gate_up_N2I, *h_gate_up, *h_down, *multiplied)
        ctx.constants, ctx.forms = constants, forms
        return dispatch.combine(y_NH, order_N.argsort().view(-1, K), routing_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out_TH):
        (ends_E, alpha, limit), (gate_up_form, down_form) = ctx.constants, ctx.forms
        saved, needs = list(ctx.saved_tensors), list(ctx.needs_input_grad)
        hidden_TH, routing_TK, order_N, gate_up_N2I = _take(saved, 4)
        h_gate_up, h_down = _take(saved, gate_up_form.num_kept), _take(saved, down_form.num_kept)
        gate_up = _assemble(gate_up_form, _take(saved, gate_up_form.num_tensors))
        down = _assemble(down_form, saved)
        needs_hidden, needs_routing, *_ = _take(needs, 5)
        needs_gate_up = _take(needs, gate_up_form.num_tensors)[gate_up_form.num_frozen :]
        needs_down = needs[down_form.num_frozen :]

        K = routing_TK.shape[1]
        token_N, slots_TK = order_N // K, order_N.argsort().view(-1, K)
        routing_N = routing_TK.flatten()[order_N].to(reference.accurate(hidden_TH.dtype))
        d_hidden_TH = d_routing_TK = None
        d_gate_up: list[Tensor | None] = [None] * len(needs_gate_up)

        # g is not yet weighted: a weight joins where it is one factor of a row's result. The gradient of the weight,
        # <g, y>, is then <d_act, act> and <g, bias>, so that y need not be kept.
        g_NH = d_out_TH.index_select(0, token_N)
        d_act_NI = _frozen_product_dx(g_NH, down, ends_E)
        dh_down = low_rank.backward(g_NH, down.low_rank, None if down.merged else d_act_NI, ends_E)
        weighted_act_NI, d_gate_up_N2I, d_routing_N = dispatch.weighted_swiglu_backward(
            gate_up_N2I, d_act_NI, routing_N, alpha=alpha, limit=limit
        )
        del d_act_NI
        if needs_routing:
            d_routing_N += dispatch.low_rank_down(g_NH, down.bias_EO[:, None], ends_E)[:, 0]
            d_routing_TK = d_routing_N[slots_TK].to(routing_TK.dtype)
        h_down = [routing_N[:, None] * h_NR for h_NR in h_down]
        h_down = h_down or low_rank.inputs_by_A(weighted_act_NI, down.low_rank, ends_E)
        d_down = low_rank.factor_gradients(weighted_act_NI, g_NH, down.low_rank, h_down, dh_down, needs_down, ends_E)
        del weighted_act_NI, g_NH

        if needs_hidden or any(needs_gate_up):
            dx_NH = _frozen_product_dx(d_gate_up_N2I, gate_up, ends_E) if needs_hidden else None
            dh_gate_up = low_rank.backward(d_gate_up_N2I, gate_up.low_rank, None if gate_up.merged else dx_NH, ends_E)
            if dx_NH is not None:
                d_hidden_TH = dispatch.combine(dx_NH, slots_TK, None)
                del dx_NH
            x_NH = hidden_TH.index_select(0, token_N)
            h_gate_up = h_gate_up or low_rank.inputs_by_A(x_NH, gate_up.low_rank, ends_E)
            d_gate_up = low_rank.factor_gradients(
                x_NH, d_gate_up_N2I, gate_up.low_rank, h_gate_up, dh_gate_up, needs_gate_up, ends_E
            )
        frozen = [None] * gate_up_form.num_frozen, [None] * down_form.num_frozen
        return d_hidden_TH, d_routing_TK, None, None, None, *frozen[0], *d_gate_up, *frozen[1], *d_down


def _take(items: list[Any], count: int) -> list[Any]:
    """Remove the first `count` items and return them."""
    taken, items[:] = items[:count], items[count:]
    return taken


def _is_step_of_generation(
    hidden_TH: Tensor, experts_TK: Tensor, routing_TK: Tensor, gate_up: ExpertProjection, down: ExpertProjection
) -> bool:
    """Whether `dispatch.expert_mixture` is to compute a packed block: of few tokens, on the CPU, without a gradient."""
    if hidden_TH.device.type != "cpu" or not cpu_mixture.takes_rows(experts_TK):
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in (hidden_TH, routing_TK, gate_up.bias_EO, down.bias_EO)):
        return False
    return not gate_up.low_rank and not down.low_rank


def _sort_by_expert(experts_TK: Tensor, gate_up: ExpertProjection) -> tuple[Tensor, list[int]]:
    """The order of the choices sorted by expert, and where each expert's end in it.

    Raises:
        ValueError: if a choice is none of the experts.
    """
    E = gate_up.bias_EO.shape[0]
    sorted_N, order_N = experts_TK.reshape(-1).sort(stable=True)
    numbers = torch.arange(-1, E, dtype=sorted_N.dtype, device=sorted_N.device)
    # The block's one wait for the device, because the host plans its products. (bincount waits twice by itself, for the
    # smallest and the largest number.)
    below, *ends_E = torch.searchsorted(sorted_N, numbers, right=True).tolist()
    if below or ends_E[-1] != len(sorted_N):
        raise ValueError(f"choices of experts must be numbers from 0 to {E - 1}")
    return order_N, ends_E


def _activate(x_NH: Tensor, gate_up: ExpertProjection, constants: _Constants) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The gate_up projection of rows before and after its activation, and x·A^T of each update."""
    gate_up_N2I, h = _project(x_NH, gate_up, constants.ends_E)
    act_NI = dispatch.clamped_swiglu(gate_up_N2I, alpha=constants.alpha, limit=constants.limit)
    return gate_up_N2I, act_NI, h


def _project(x_NI: Tensor, projection: ExpertProjection, ends_E: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """The projection of rows, and x·A^T of each update that is not in the weights."""
    y_NO = _frozen_product(x_NI, projection, ends_E)
    return y_NO, [] if projection.merged else low_rank.add_updates_(y_NO, x_NI, projection.low_rank, ends_E)


def _frozen_product(x_NI: Tensor, projection: ExpertProjection, ends_E: Sequence[int]) -> Tensor:
    if isinstance(projection.weight, MXFP4Weight):
        return dispatch.grouped_linear(x_NI, projection.weight, projection.bias_EO, ends_E)
    # Stored [E, in, out], it is the operand of a product with the other orientation.
    y_NO = dispatch.grouped_dense_dx(x_NI, projection.weight, ends_E)
    # A bias is an update of rank one, so all experts' are added in one call.
    ones_N1 = y_NO.new_ones(len(y_NO), 1, dtype=reference.accurate(y_NO.dtype))
    dispatch.low_rank_up_(y_NO, ones_N1, projection.bias_EO[:, None], 1.0, ends_E)
    return y_NO


def _frozen_product_dx(dy_NO: Tensor, projection: ExpertProjection, ends_E: Sequence[int]) -> Tensor:
    if isinstance(projection.weight, MXFP4Weight):
        return dispatch.grouped_linear_dx(dy_NO, projection.weight, ends_E)
    return dispatch.grouped_dense(dy_NO, projection.weight, None, ends_E)


def _trained_product(x_NI: Tensor, weight_EIO: Tensor, bias_EO: Tensor, ends_E: Sequence[int]) -> Tensor:
    """The product with dense weights that autograd differentiates in the weights too."""
    parts = zip(x_NI.split(_sizes(ends_E)), weight_EIO.unbind(0), bias_EO.unbind(0), strict=True)
    return torch.cat([torch.addmm(bias_O, x, weight_IO) for x, weight_IO, bias_O in parts])


def _sizes(ends_E: Sequence[int]) -> list[int]:
    return [end - start for start, end in zip((0, *ends_E[:-1]), ends_E, strict=True)]


def _trains_weights(projection: ExpertProjection) -> bool:
    if not isinstance(projection.weight, MXFP4Weight):
        return projection.weight.requires_grad or projection.bias_EO.requires_grad
    if projection.bias_EO.requires_grad:
        raise ValueError("expert biases cannot be trained beside packed weights: call requires_grad_(False) on them")
    return False


def _autograd_block(
    hidden_TH: Tensor,
    routing_TK: Tensor,
    order_N: Tensor,
    gate_up: ExpertProjection,
    down: ExpertProjection,
    constants: _Constants,
) -> Tensor:
    """The block for training its dense weights, composed of what torch can differentiate."""

    def project(x_NI: Tensor, projection: ExpertProjection) -> Tensor:
        if isinstance(projection.weight, MXFP4Weight):
            y_NO = _frozen_product(x_NI, projection, ends_E)
        else:
            y_NO = _trained_product(x_NI, projection.weight, projection.bias_EO, ends_E)
        for lora in projection.low_rank:
            y_NO = y_NO + reference.grouped_lora(x_NI, lora.A_ERI, lora.B_EOR, lora.scaling, ends_E, lora.experts)
        return y_NO

    (ends_E, alpha, limit), K = constants, routing_TK.shape[1]
    gate_up_N2I = project(hidden_TH[order_N // K], gate_up)
    y_NH = project(reference.clamped_swiglu(gate_up_N2I, alpha=alpha, limit=limit), down)
    return reference.combine(y_NH, order_N.argsort().view(-1, K), routing_TK)
