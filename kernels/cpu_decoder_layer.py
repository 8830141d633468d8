"""Whole layers, for the few tokens of a step of generation, in one call of the compiled library.

B rows · T tokens of each · H hidden · N query heads · K key/value heads · S keys · D head dimension · C half of it
E experts · I intermediate · R rows of the rotation, B or one
"""

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from gptoss_ft.kernels import cpu_attention, cpu_mixture
from gptoss_ft.kernels.cpu_attention import View
from gptoss_ft.kernels.cpu_library import DTYPES, INT, LONG, MAX_CHOICES, MAX_TOKENS, POINTER, check, common, function
from gptoss_ft.kernels.reference import BLOCK_SIZE, LayerWeights

FLOAT = ctypes.c_float


class _DecoderLayer(ctypes.Structure):
    """`struct DecoderLayer` of cpu/decoder_layer.h."""

    _fields_ = (
        *((dtype, INT) for dtype in ("dense", "dense_bias", "norms", "sinks_dtype", "expert_bias", "choices")),
        *((size, LONG) for size in ("hidden", "intermediate", "num_experts", "query_heads", "kv_heads", "head_dim")),
        ("window", LONG),
        *((constant, FLOAT) for constant in ("input_epsilon", "epsilon", "scaling", "alpha", "limit")),
        *((name, POINTER) for name in ("input_norm", "query", "key", "value", "query_bias", "key_bias", "value_bias")),
        *((name, POINTER) for name in ("sinks", "projection", "projection_bias", "norm", "router", "router_bias")),
        *((name, POINTER) for name in ("gate_up", "gate_up_scales", "gate_up_bias")),
        *((name, POINTER) for name in ("down", "down_scales", "down_bias")),
    )


class _Step(ctypes.Structure):
    """`struct Step` of cpu/decoder_layer.h."""

    _fields_ = (
        ("x", POINTER),
        *((size, LONG) for size in ("batch", "queries", "keys")),
        *((name, POINTER) for name in ("cos", "sin")),
        ("rotations", LONG),
        *((name, View) for name in ("k", "v")),
        *((name, POINTER) for name in ("documents", "out")),
    )


# What `_checked` made, as long as the weights are there.
_layers: WeakKeyDictionary[LayerWeights, _DecoderLayer] = WeakKeyDictionary()


def refusal(
    hidden_BTH: Tensor,
    keys_BKSD: Tensor,
    values_BKSD: Tensor,
    cos_RTC: Tensor,
    sin_RTC: Tensor,
    weights: LayerWeights,
    **_: Any,
) -> str:
    """Why the library does not take these operands; empty if it does."""
    tokens, choices = hidden_BTH.shape[0] * hidden_BTH.shape[1], weights.top_k
    if not 0 < tokens <= MAX_TOKENS or tokens * choices > MAX_CHOICES:
        return f"there are {choices} choices of {tokens} tokens, not up to {MAX_CHOICES} of up to {MAX_TOKENS}"
    dense, biases, norms, expert_biases, packed = _kinds(weights)
    for kind in (dense, biases, norms, expert_biases):
        if len({t.dtype for t in kind}) > 1 or kind[0].dtype not in DTYPES or weights.sinks_N.dtype not in DTYPES:
            return "weights or biases are not fp32 or bf16, or not all alike"
    states = (hidden_BTH, keys_BKSD, values_BKSD, cos_RTC, sin_RTC)
    if len({t.dtype for t in states}) > 1:
        return "the keys, the values or the rotation are not in the dtype of the rows"
    if any(t.dtype != torch.uint8 for t in packed):
        return "packed weights are not uint8"
    # A copy would double the memory of the largest tensors there are.
    if not all(t.is_contiguous() for t in weights.tensors()):
        return "weights or biases are not contiguous"
    if keys_BKSD.stride(-1) != 1 or values_BKSD.stride(-1) != 1:
        return "keys or values are not contiguous along a head"
    # Of queries it looks at the head dimension only.
    return cpu_attention.refusal(keys_BKSD, keys_BKSD, values_BKSD, weights.sinks_N, scaling=weights.scaling)


def decoder_layer(
    hidden_BTH: Tensor,
    keys_BKSD: Tensor,
    values_BKSD: Tensor,
    cos_RTC: Tensor,
    sin_RTC: Tensor,
    weights: LayerWeights,
    documents_BS: Tensor | None = None,
) -> Tensor:
    """`reference.decoder_layer` of what `refusal` lets pass.

    Of experts with equal logits the first ones are chosen; torch promises no order of them. Nothing is rounded before
    it is rotated.

    Raises:
        ValueError: if shapes do not fit together, or there are fewer experts than are to be chosen.
    """
    step = prepared(hidden_BTH, keys_BKSD, values_BKSD, cos_RTC, sin_RTC, weights, documents_BS)
    run([step])
    return step.out_BTH


class Prepared(NamedTuple):
    """A layer that is to be computed: what for and in which memory, in the terms of the library."""

    common: tuple[int, int, int]
    layer: _DecoderLayer
    step: _Step
    out_BTH: Tensor
    # What the addresses in `step` are of.
    operands: tuple[Any, ...]


def run(steps: Sequence[Prepared]) -> None:
    """Compute layers, in an order in which each finds its operands computed."""
    # isa, threads, dtype, number of layers, layers, steps
    types = (INT, INT, INT, LONG, POINTER, POINTER)
    layers = (ctypes.POINTER(_DecoderLayer) * len(steps))(*(ctypes.pointer(step.layer) for step in steps))
    in_order = (_Step * len(steps))(*(step.step for step in steps))
    check(function("gptoss_ft_decoder_layers", *types)(*steps[0].common, len(steps), layers, in_order))


def prepared(
    hidden_BTH: Tensor,
    keys_BKSD: Tensor,
    values_BKSD: Tensor,
    cos_RTC: Tensor,
    sin_RTC: Tensor,
    weights: LayerWeights,
    documents_BS: Tensor | None = None,
) -> Prepared:
    """`decoder_layer` that nothing is computed of yet; the rows may be the output of another that is not either."""
    layer = _layers.get(weights)
    if layer is None:
        layer = _layers[weights] = _checked(weights)
    (B, T, H), (_, K, S, D), R = hidden_BTH.shape, keys_BKSD.shape, len(cos_RTC)
    if (layer.hidden, layer.kv_heads, layer.head_dim) != (H, K, D):
        shapes, heads = (tuple(hidden_BTH.shape), tuple(keys_BKSD.shape)), f"{layer.kv_heads} heads of {layer.head_dim}"
        raise ValueError(f"hidden and keys {shapes} must be of {layer.hidden} features, {heads}")
    # It has memory for no more, and reads all states by the dtype of the rows.
    if not 0 < B * T <= MAX_TOKENS or B * T * layer.choices > MAX_CHOICES:
        raise ValueError(f"{layer.choices} choices of {B * T} tokens must be up to {MAX_CHOICES} of {MAX_TOKENS}")
    if any(t.dtype != hidden_BTH.dtype for t in (keys_BKSD, values_BKSD, cos_RTC, sin_RTC)):
        raise ValueError(f"keys, values and rotation must be {hidden_BTH.dtype}")
    if keys_BKSD.shape != (B, K, S, D) or values_BKSD.shape != keys_BKSD.shape or T > S:
        shapes = tuple(keys_BKSD.shape), tuple(values_BKSD.shape)
        raise ValueError(f"keys and values {shapes} must be twice {(B, K, S, D)}, with {T} positions or more")
    if cos_RTC.shape != (R, T, D // 2) or sin_RTC.shape != cos_RTC.shape or R not in (1, B):
        raise ValueError(f"cos {tuple(cos_RTC.shape)} and sin {tuple(sin_RTC.shape)} must be {(B, T, D // 2)}")
    if documents_BS is not None:
        if documents_BS.shape != (B, S):
            raise ValueError(f"documents {tuple(documents_BS.shape)} must be {(B, S)}")
        documents_BS = documents_BS.to(torch.int32).contiguous()
    hidden_BTH, cos_RTC, sin_RTC = hidden_BTH.contiguous(), cos_RTC.contiguous(), sin_RTC.contiguous()
    out_BTH = hidden_BTH.new_empty(B, T, H)
    step = _Step(
        hidden_BTH.data_ptr(),
        *(B, T, S),
        *(cos_RTC.data_ptr(), sin_RTC.data_ptr(), R * T),
        View.of(keys_BKSD),
        View.of(values_BKSD),
        None if documents_BS is None else documents_BS.data_ptr(),
        out_BTH.data_ptr(),
    )
    operands = (hidden_BTH, keys_BKSD, values_BKSD, cos_RTC, sin_RTC, weights, documents_BS)
    return Prepared(common(hidden_BTH.dtype), layer, step, out_BTH, operands)


def _checked(of: LayerWeights) -> _DecoderLayer:
    """What the library is given of weights whose shapes fit together."""
    H, (N,), D, (E, _, G, _) = len(of.input_norm_H), of.sinks_N.shape, of.head_dim, of.down.blocks_EOGB.shape
    K, I = of.kv_heads, G * BLOCK_SIZE
    for name, tensor, shape in (
        ("input norm", of.input_norm_H, (H,)),
        ("query", of.query_OH, (N * D, H)),
        ("bias of the query", of.query_bias_O, (N * D,)),
        ("key", of.key_OH, (K * D, H)),
        ("bias of the key", of.key_bias_O, (K * D,)),
        ("value", of.value_OH, (K * D, H)),
        ("bias of the value", of.value_bias_O, (K * D,)),
        ("projection", of.projection_HW, (H, N * D)),
        ("bias of the projection", of.projection_bias_H, (H,)),
        ("norm", of.norm_H, (H,)),
        ("router", of.router_EH, (E, H)),
        ("bias of the router", of.router_bias_E, (E,)),
    ):
        if tensor.shape != shape:
            raise ValueError(f"{name} {tuple(tensor.shape)} must be {shape}")
    if K == 0 or N % K:
        raise ValueError(f"{N} query heads must be a multiple of {K} key/value heads")
    if of.window is not None and of.window < 1:
        raise ValueError(f"window {of.window} must be 1 or more: a query sees itself")
    cpu_mixture.check_experts(H, I, E, of.gate_up, of.gate_up_bias_EO, of.down, of.down_bias_EH)
    if not 0 < of.top_k <= E:
        raise ValueError(f"{of.top_k} of {E} experts cannot be chosen")
    dense, biases, norms, expert_biases, _ = _kinds(of)
    kinds = (DTYPES[t.dtype] for t in (dense[0], biases[0], norms[0], of.sinks_N, expert_biases[0]))
    constants = (of.input_epsilon, of.epsilon, of.scaling, of.alpha, of.limit)
    in_order = (
        of.input_norm_H,
        *(of.query_OH, of.key_OH, of.value_OH),
        *(of.query_bias_O, of.key_bias_O, of.value_bias_O),
        *(of.sinks_N, of.projection_HW, of.projection_bias_H, of.norm_H, of.router_EH, of.router_bias_E),
        *(*of.gate_up, of.gate_up_bias_EO, *of.down, of.down_bias_EH),
    )
    addresses = (t.data_ptr() for t in in_order)
    return _DecoderLayer(*kinds, of.top_k, H, I, E, N, K, D, of.window or 0, *constants, *addresses)


def _kinds(of: LayerWeights) -> tuple[tuple[Tensor, ...], ...]:
    """Tensors of one dtype each: dense weights, their biases, norms, biases of experts, and packed weights."""
    return (
        (of.query_OH, of.key_OH, of.value_OH, of.projection_HW, of.router_EH),
        (of.query_bias_O, of.key_bias_O, of.value_bias_O, of.projection_bias_H, of.router_bias_E),
        (of.input_norm_H, of.norm_H),
        (of.gate_up_bias_EO, of.down_bias_EH),
        (*of.gate_up, *of.down),
    )
