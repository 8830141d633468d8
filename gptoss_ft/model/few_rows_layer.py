"""Decoder layers that cost a step of generation one kernel, and the use of all layers for few rows in a model.

B rows · T tokens of each · H hidden · K key/value heads · S positions of the cache · D head dimension
"""

import os
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers import Cache
from transformers.models.gpt_oss.modeling_gpt_oss import (
    GptOssAttention,
    GptOssDecoderLayer,
    GptOssMLP,
    GptOssModel,
    GptOssRMSNorm,
    GptOssTopKRouter,
)

from gptoss_ft.kernels.cpu_decoder_layer import Prepared, prepared
from gptoss_ft.kernels.cpu_library import ISA_VARIABLE, running_in
from gptoss_ft.kernels.dispatch import decoder_layer
from gptoss_ft.kernels.reference import LayerWeights, MXFP4Weight
from gptoss_ft.kernels.registry import REFERENCE
from gptoss_ft.model.attention import ATTENTION, DocumentMask
from gptoss_ft.model.cache import growing_layer
from gptoss_ft.model.experts import PackedExperts
from gptoss_ft.model.few_rows import FewRowsAttention, FewRowsRMSNorm, FewRowsRouter, has_few_rows, is_plain
from gptoss_ft.model.linear import FrozenLinear
from gptoss_ft.model.pending import Pending

# What has to be in a layer, and nothing else be done by it.
MODULES = {
    "input_layernorm": FewRowsRMSNorm,
    "self_attn": FewRowsAttention,
    "self_attn.q_proj": FrozenLinear,
    "self_attn.k_proj": FrozenLinear,
    "self_attn.v_proj": FrozenLinear,
    "self_attn.o_proj": FrozenLinear,
    "post_attention_layernorm": FewRowsRMSNorm,
    "mlp": GptOssMLP,
    "mlp.router": FewRowsRouter,
    "mlp.experts": PackedExperts,
}
# Of `LayerWeights`; packed weights are of two parameters each.
PARAMETERS = {
    "input_norm_H": "input_layernorm.weight",
    "query_OH": "self_attn.q_proj.weight",
    "query_bias_O": "self_attn.q_proj.bias",
    "key_OH": "self_attn.k_proj.weight",
    "key_bias_O": "self_attn.k_proj.bias",
    "value_OH": "self_attn.v_proj.weight",
    "value_bias_O": "self_attn.v_proj.bias",
    "sinks_N": "self_attn.sinks",
    "projection_HW": "self_attn.o_proj.weight",
    "projection_bias_H": "self_attn.o_proj.bias",
    "norm_H": "post_attention_layernorm.weight",
    "router_EH": "mlp.router.weight",
    "router_bias_E": "mlp.router.bias",
    "gate_up_bias_EO": "mlp.experts.gate_up_proj_bias",
    "down_bias_EH": "mlp.experts.down_proj_bias",
    "gate_up_blocks": "mlp.experts.gate_up_proj_blocks",
    "gate_up_scales": "mlp.experts.gate_up_proj_scales",
    "down_blocks": "mlp.experts.down_proj_blocks",
    "down_scales": "mlp.experts.down_proj_scales",
}


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
        pending: Pending | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """`[B, T, H] -> [B, T, H]`, which is computed together with that of the layers after it if `pending` is."""
        pending = pending or Pending()
        if position_embeddings is not None and has_few_rows(hidden_states, self) and not _has_global_hooks():
            states = (hidden_states, attention_mask, position_ids, past_key_values, position_embeddings)
            if (step := self._step(*states)) is not None:
                pending.add(step)
                return step.out_BTH
        pending.pass_over()
        return super().forward(
            hidden_states, attention_mask, position_ids, past_key_values, use_cache, position_embeddings, **kwargs
        )

    def _step(
        self,
        hidden_BTH: Tensor,
        attention_mask: Any,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
        position_embeddings: tuple[Tensor, Tensor],
    ) -> Prepared | None:
        """The layer, to be computed; None if that takes more than the kernel, and nothing was done then."""
        (B, T, _), S, cached = hidden_BTH.shape, 0, None
        kernel = _kernel(self, hidden_BTH, position_embeddings)
        if kernel is None:
            return None
        weights, function = kernel
        states: tuple[Tensor, ...] = position_embeddings
        if past_key_values is not None:
            cached = growing_layer(past_key_values, self.self_attn.layer_idx)
            if cached is None:
                return None
            S, states = cached.keys.shape[2], (cached.keys, cached.values, *states)
            shape = B, weights.kv_heads, S, weights.head_dim
            if cached.keys.shape != shape or cached.values.shape != shape:
                return None
        if any(t.dtype != hidden_BTH.dtype or (t.requires_grad and torch.is_grad_enabled()) for t in states):
            return None
        mask = DocumentMask(S + T) if attention_mask is None else attention_mask
        if not isinstance(mask, DocumentMask) or mask.num_keys != S + T:
            return None
        documents_BS, tree = mask.documents(position_ids, B, T, hidden_BTH.device)
        if tree is not None:
            return None
        if cached is None:
            keys, values = (_new_states(weights, hidden_BTH) for _ in range(2))
        else:
            keys, values = cached.extended(T)
        return function(hidden_BTH, keys, values, *position_embeddings, weights, documents_BS)


class _Found(NamedTuple):
    """The weights of a layer, where they were found, and what computes it in each case that there was."""

    modules: tuple[tuple[dict[str, nn.Module | None], str, nn.Module], ...]
    parameters: tuple[tuple[dict[str, nn.Parameter | None], str, tuple[Any, ...]], ...]
    constants: dict[str, Any]
    weights: LayerWeights
    functions: dict[tuple[Any, ...], Callable[..., Prepared] | None]

    def is_as_found(self) -> bool:
        """Whether all is where it was, and nothing else is to be done by a module."""
        return (
            all(
                children[name] is module and is_plain(module, kind)
                for (children, name, module), kind in zip(self.modules, MODULES.values(), strict=True)
            )
            and all(place == _place(own[name]) for own, name, place in self.parameters)
            and self.constants == _constants([module for _, _, module in self.modules])
        )


# Beside the layers, which are copied and pickled.
_found: WeakKeyDictionary[FewRowsDecoderLayer, _Found] = WeakKeyDictionary()


def _kernel(
    layer: FewRowsDecoderLayer, hidden_BTH: Tensor, rotation: tuple[Tensor, Tensor]
) -> tuple[LayerWeights, Callable[..., Prepared]] | None:
    """What computes the same as transformers with every module and hook that there is; None if nothing does."""
    attention = layer.self_attn
    if attention.config._attn_implementation != ATTENTION or (attention.training and attention.attention_dropout):
        return None
    found = _found.get(layer)
    if found is None or not found.is_as_found():
        # Replaced weights are not kept alive.
        _found.pop(layer, None)
        found = _find(layer)
        if found is None:
            return None
        _found[layer] = found
    case = *(t.dtype for t in (hidden_BTH, *rotation)), hidden_BTH.shape, os.environ.get(ISA_VARIABLE)
    if case not in found.functions:
        found.functions[case] = _chosen(hidden_BTH, rotation, found.weights)
    function = found.functions[case]
    return (found.weights, function) if function else None


def _find(layer: FewRowsDecoderLayer) -> _Found | None:
    modules = []
    for path, kind in MODULES.items():
        parent, _, name = path.rpartition(".")
        children = layer.get_submodule(parent)._modules
        module = children.get(name)
        if module is None or not is_plain(module, kind):
            return None
        modules.append((children, name, module))
    parameters, tensors = [], {}
    for field, path in PARAMETERS.items():
        parent, _, name = path.rpartition(".")
        own = layer.get_submodule(parent)._parameters
        tensor = own.get(name)
        if tensor is None:
            return None
        parameters.append((own, name, _place(tensor)))
        tensors[field] = tensor
    gate_up, down = (
        MXFP4Weight(tensors.pop(f"{name}_blocks"), tensors.pop(f"{name}_scales")) for name in ("gate_up", "down")
    )
    constants = _constants([module for _, _, module in modules])
    weights = LayerWeights(**tensors, gate_up=gate_up, down=down, **constants)
    return _Found(tuple(modules), tuple(parameters), constants, weights, {})


def _chosen(
    hidden_BTH: Tensor, rotation: tuple[Tensor, Tensor], weights: LayerWeights
) -> Callable[..., Prepared] | None:
    """`prepared` in the instruction set that dispatch chooses; None if that is plain torch."""
    states_BKTD = _new_states(weights, hidden_BTH)
    implementation = decoder_layer.chosen(hidden_BTH, states_BKTD, states_BKTD, *rotation, weights).implementation
    return None if implementation == REFERENCE else running_in(implementation.removeprefix("cpu/"), prepared)


def _new_states(weights: LayerWeights, hidden_BTH: Tensor) -> Tensor:
    """Memory for the keys or the values of tokens alone."""
    B, T, _ = hidden_BTH.shape
    return hidden_BTH.new_empty(B, weights.kv_heads, T, weights.head_dim)


def _place(tensor: Tensor | None) -> tuple[Any, ...]:
    return () if tensor is None else (tensor.data_ptr(), tensor.dtype, tensor.shape)


def _constants(modules: Sequence[Any]) -> dict[str, Any]:
    """Those of `LayerWeights`, from modules in the order of `MODULES`."""
    input_norm, attention, *_, norm, _, router, experts = modules
    return {
        "head_dim": attention.head_dim,
        "window": attention.sliding_window,
        "scaling": attention.scaling,
        "input_epsilon": input_norm.variance_epsilon,
        "epsilon": norm.variance_epsilon,
        "top_k": router.top_k,
        "alpha": experts.alpha,
        "limit": experts.limit,
    }


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
    for module in model.modules():
        if isinstance(module, GptOssModel):
            module.register_forward_pre_hook(_with_pending, with_kwargs=True)


def _with_pending(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Let the layers of transformers' own forward wait for each other, if nothing else sees what they return.

    It hands its keyword arguments to every layer.
    """
    is_own = type(model) is GptOssModel and "forward" not in vars(model)
    if is_own and all(is_plain(layer, FewRowsDecoderLayer) for layer in model.layers):
        return args, {**kwargs, "pending": Pending(len(model.layers))}
    return None


def _has_global_hooks() -> bool:
    return bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)


def _as(kind: type[nn.Module], module: nn.Module) -> nn.Module:
    """The same layer over the same parameters, of a class that only computes it otherwise."""
    made = copy(module)
    made.__class__ = kind
    return made
