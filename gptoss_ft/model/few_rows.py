"""Layers that cost a step of generation one or two kernels where transformers composes them of slower operations.

They compute few rows on a CPU so, unless a gradient is wanted; everything else is transformers' own.
"""

import os
from collections.abc import Callable
from copy import copy
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.models.gpt_oss.modeling_gpt_oss import (
    GptOssAttention,
    GptOssDecoderLayer,
    GptOssMLP,
    GptOssRMSNorm,
    GptOssTopKRouter,
)
from transformers.utils import output_capturing

from gptoss_ft.kernels.cpu_library import ISA_VARIABLE, MAX_TOKENS
from gptoss_ft.kernels.dispatch import attention_inputs, decoder_layer, linear, rms_norm
from gptoss_ft.kernels.reference import LayerWeights
from gptoss_ft.kernels.registry import REFERENCE
from gptoss_ft.model.attention import ATTENTION, DocumentMask, attention_forward
from gptoss_ft.model.cache import growing_layer
from gptoss_ft.model.experts import PROJECTIONS, PackedExperts
from gptoss_ft.model.linear import FrozenLinear


class FewRowsRMSNorm(GptOssRMSNorm):
    """`GptOssRMSNorm` in one kernel."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[..., H] -> [..., H]`"""
        if not _has_few_rows(hidden_states, self):
            return super().forward(hidden_states)
        x_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        return rms_norm(x_TH, self.weight, self.variance_epsilon).view_as(hidden_states)


class FewRowsRouter(GptOssTopKRouter):
    """`GptOssTopKRouter` whose product is that of the other frozen layers."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`[T, H]` to the logits of all experts `[T, E]`, the weights of those chosen `[T, K]`, and their numbers."""
        if not _has_few_rows(hidden_states, self):
            return super().forward(hidden_states)
        logits_TE = linear(hidden_states, self.weight, self.bias)
        chosen_TK, experts_TK = logits_TE.topk(self.top_k, dim=-1)
        return logits_TE, chosen_TK.softmax(-1), experts_TK


class FewRowsAttention(GptOssAttention):
    """`GptOssAttention` that makes rotated queries, keys and values in one kernel.

    Projections that have an adapter or a hook, and other attention functions than ours, are left to transformers.
    """

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """`[B, T, H] -> [B, T, H]`, and no attention weights."""
        if not self.takes(hidden_states):
            return super().forward(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
        B, T, _ = hidden_states.shape
        q, k, v = self.q_proj, self.k_proj, self.v_proj
        cos_TC, sin_TC = (half_BTC.expand(B, T, -1).flatten(0, 1) for half_BTC in position_embeddings)
        states_TO = attention_inputs(
            hidden_states.flatten(0, 1), q.weight, q.bias, k.weight, k.bias, v.weight, v.bias, cos_TC, sin_TC
        )
        states_BHTD = states_TO.view(B, T, -1, self.head_dim).transpose(1, 2)
        K = self.config.num_key_value_heads
        query, key, value = states_BHTD.split((states_BHTD.shape[1] - 2 * K, K, K), dim=1)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        out_BTHD, _ = attention_forward(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            s_aux=self.sinks,
            **kwargs,
        )
        return self.o_proj(out_BTHD.flatten(2)), None

    def takes(self, hidden_states: Tensor) -> bool:
        """Whether the kernel computes the same as transformers with every module and hook that there is."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        if self.config._attn_implementation != ATTENTION or not all(_is_plain(p, FrozenLinear) for p in projections):
            return False
        return _has_few_rows(hidden_states, *projections)


class FewRowsDecoderLayer(GptOssDecoderLayer):
    """`GptOssDecoderLayer` in one kernel, which writes keys and values into a cache that grows in place.

    A layer that has an adapter, a hook inside, experts that are not packed or another kind of cache is composed as
    transformers does, and so is one that the kernel refuses.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """`[B, T, H] -> [B, T, H]`"""
        if position_embeddings is not None and self._takes(hidden_states):
            out = self._step(hidden_states, attention_mask, position_ids, past_key_values, position_embeddings)
            if out is not None:
                return out
        return super().forward(
            hidden_states, attention_mask, position_ids, past_key_values, use_cache, position_embeddings, **kwargs
        )

    def _takes(self, hidden_states: Tensor) -> bool:
        """Whether the kernel computes the same as transformers with every module and hook that there is."""
        attention, mlp = self.self_attn, self.mlp
        if not _is_plain(attention, FewRowsAttention) or not _is_plain(mlp, GptOssMLP):
            return False
        parts = (
            (self.input_layernorm, FewRowsRMSNorm),
            (self.post_attention_layernorm, FewRowsRMSNorm),
            (attention.o_proj, FrozenLinear),
            (mlp.router, FewRowsRouter),
            (mlp.experts, PackedExperts),
        )
        if not all(_is_plain(part, kind) for part, kind in parts):
            return False
        return attention.takes(hidden_states) and _has_few_rows(hidden_states, *(part for part, _ in parts))

    def _step(
        self,
        hidden_BTH: Tensor,
        attention_mask: Any,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
        position_embeddings: tuple[Tensor, Tensor],
    ) -> Tensor | None:
        """The output; None if the kernel or the cache is none for it, which nothing was done to then."""
        attention, (B, T, _) = self.self_attn, hidden_BTH.shape
        kernel = _kernel(self, hidden_BTH, position_embeddings)
        if kernel.function is None or (attention.training and attention.attention_dropout):
            return None
        if past_key_values is None:
            S, cached = 0, None
        else:
            cached = growing_layer(past_key_values, attention.layer_idx)
            if cached is None or len(cached.keys) != B or cached.keys.dtype != hidden_BTH.dtype:
                return None
            S = cached.keys.shape[2]
        documents_BS = None
        if attention_mask is not None:
            if not isinstance(attention_mask, DocumentMask) or attention_mask.num_keys != S + T:
                return None
            documents_BS, tree = attention_mask.documents(position_ids, B, T, hidden_BTH.device)
            if tree is not None:
                return None
        K, D = attention.config.num_key_value_heads, attention.head_dim
        keys, values = cached.extended(T) if cached else (hidden_BTH.new_empty(B, K, T, D) for _ in range(2))
        return kernel.function(hidden_BTH, keys, values, *position_embeddings, kernel.weights, documents_BS)


class _Kernel(NamedTuple):
    """What computes a layer (None: nothing but plain torch), and for which operands that was found."""

    found_for: tuple[Any, ...]
    weights: LayerWeights
    function: Callable[..., Tensor] | None


# Beside the layers, which are copied and pickled.
_kernels: WeakKeyDictionary[FewRowsDecoderLayer, _Kernel] = WeakKeyDictionary()


def _kernel(layer: FewRowsDecoderLayer, hidden_BTH: Tensor, rotation: tuple[Tensor, Tensor]) -> _Kernel:
    """The kernel for a layer, which is chosen and checked once for parameters that stay where they are."""
    attention, router, experts = layer.self_attn, layer.mlp.router, layer.mlp.experts
    q, k, v, o = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
    input_norm, norm = layer.input_layernorm, layer.post_attention_layernorm
    (gate_up, gate_up_bias_EO), (down, down_bias_EH) = map(experts.packed, PROJECTIONS)
    tensors = {
        "input_norm_H": input_norm.weight,
        "query_OH": q.weight,
        "query_bias_O": q.bias,
        "key_OH": k.weight,
        "key_bias_O": k.bias,
        "value_OH": v.weight,
        "value_bias_O": v.bias,
        "sinks_N": attention.sinks,
        "projection_HW": o.weight,
        "projection_bias_H": o.bias,
        "norm_H": norm.weight,
        "router_EH": router.weight,
        "router_bias_E": router.bias,
        "gate_up_bias_EO": gate_up_bias_EO,
        "down_bias_EH": down_bias_EH,
    }
    found_for = (
        *(hidden_BTH.dtype, hidden_BTH.shape, os.environ.get(ISA_VARIABLE)),
        *((t.data_ptr(), t.dtype, t.shape) for t in (*tensors.values(), *gate_up, *down)),
    )
    known = _kernels.get(layer)
    if known and known.found_for == found_for:
        return known
    weights = LayerWeights(
        **tensors,
        gate_up=gate_up,
        down=down,
        head_dim=attention.head_dim,
        window=attention.sliding_window,
        scaling=attention.scaling,
        input_epsilon=input_norm.variance_epsilon,
        epsilon=norm.variance_epsilon,
        top_k=router.top_k,
        alpha=experts.alpha,
        limit=experts.limit,
    )
    (B, T, _), K = hidden_BTH.shape, attention.config.num_key_value_heads
    states_BKTD = hidden_BTH.new_empty(B, K, T, attention.head_dim)
    choice = decoder_layer.chosen(hidden_BTH, states_BKTD, states_BKTD, *rotation, weights)
    function = None if choice.implementation == REFERENCE else choice.function
    made = _kernels[layer] = _Kernel(found_for, weights, function)
    return made


# Libraries that spread a model over devices find its layers by this name.
FewRowsDecoderLayer.__name__ = GptOssDecoderLayer.__name__


def use_few_rows_layers(model: nn.Module) -> None:
    """Replace every layer of transformers' in `model` that has one here; parameters keep their names and memory."""
    kinds = {
        GptOssRMSNorm: FewRowsRMSNorm,
        GptOssTopKRouter: FewRowsRouter,
        GptOssAttention: FewRowsAttention,
        GptOssDecoderLayer: FewRowsDecoderLayer,
    }
    for name, module in list(model.named_modules()):
        if kind := kinds.get(type(module)):
            model.set_submodule(name, _as(kind, module))


def _has_few_rows(x: Tensor, *modules: nn.Module) -> bool:
    if x.device.type != "cpu" or x.numel() > MAX_TOKENS * x.shape[-1]:
        return False
    if not torch.is_grad_enabled():
        return True
    return not x.requires_grad and not any(t.requires_grad for module in modules for t in module.parameters())


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether nothing would be left out if its forward were not called."""
    # accelerate's hooks replace forward on the module itself.
    if type(module) is not kind or module._forward_pre_hooks or "forward" in vars(module):
        return False
    return not module._forward_hooks or all(map(_is_idle, module._forward_hooks.values()))


def _is_idle(hook: Callable[..., Any]) -> bool:
    """Whether it is one that transformers left behind when it was once asked for hidden states or router logits."""
    return getattr(hook, "__module__", "") == output_capturing.__name__ and not output_capturing._active_collector.get()


def _as(kind: type[nn.Module], module: nn.Module) -> nn.Module:
    """The same layer over the same parameters, of a class that only computes it otherwise."""
    made = copy(module)
    made.__class__ = kind
    return made
