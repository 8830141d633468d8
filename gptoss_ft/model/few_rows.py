"""Layers that cost a step of generation one or two kernels where transformers composes them of slower operations.

They compute few rows on a CPU so, unless a gradient is wanted; everything else is transformers' own.
"""

from copy import copy
from typing import Any

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

from gptoss_ft.kernels.cpu_mixture import MAX_ROWS as MAX_CHOICES
from gptoss_ft.kernels.cpu_norm import MAX_ROWS
from gptoss_ft.kernels.dispatch import attention_inputs, layer_output, linear, rms_norm
from gptoss_ft.model.attention import ATTENTION, attention_forward
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
        heads_BTW = self.heads(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
        return self.o_proj(heads_BTW), None

    def takes(self, hidden_states: Tensor) -> bool:
        """Whether `heads` computes the same as transformers with every module and hook that there is."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        if self.config._attn_implementation != ATTENTION or not all(_is_plain(p, FrozenLinear) for p in projections):
            return False
        return _has_few_rows(hidden_states, *projections)

    def heads(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The outputs of all heads side by side, before `o_proj` adds them up: `[B, T, H] -> [B, T, W]`."""
        B, T, _ = hidden_states.shape
        q, k, v = self.q_proj, self.k_proj, self.v_proj
        cos_TC, sin_TC = (half.expand(B, T, -1).flatten(0, 1) for half in position_embeddings)
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
        return out_BTHD.flatten(2)


class FewRowsDecoderLayer(GptOssDecoderLayer):
    """`GptOssDecoderLayer` that computes all that follows the attention heads in one kernel.

    A layer that has an adapter, a hook inside, or experts that are not packed is composed as transformers does.
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
        if position_embeddings is None or not self._takes(hidden_states):
            return super().forward(
                hidden_states, attention_mask, position_ids, past_key_values, use_cache, position_embeddings, **kwargs
            )
        attention, norm, router = self.self_attn, self.post_attention_layernorm, self.mlp.router
        heads_BTW = attention.heads(
            self.input_layernorm(hidden_states),
            position_embeddings,
            attention_mask,
            past_key_values,
            position_ids=position_ids,
            **kwargs,
        )
        o_proj, experts = attention.o_proj, self.mlp.experts
        (gate_up, gate_up_bias_EO), (down, down_bias_EH) = map(experts.packed, PROJECTIONS)
        return layer_output(
            heads_BTW.flatten(0, 1),
            hidden_states.flatten(0, 1),
            o_proj.weight,
            o_proj.bias,
            norm.weight,
            router.weight,
            router.bias,
            gate_up,
            gate_up_bias_EO,
            down,
            down_bias_EH,
            epsilon=norm.variance_epsilon,
            top_k=router.top_k,
            alpha=experts.alpha,
            limit=experts.limit,
        ).view_as(hidden_states)

    def _takes(self, hidden_states: Tensor) -> bool:
        attention, mlp = self.self_attn, self.mlp
        if not _is_plain(attention, FewRowsAttention) or not _is_plain(mlp, GptOssMLP):
            return False
        parts = (
            (self.post_attention_layernorm, FewRowsRMSNorm),
            (attention.o_proj, FrozenLinear),
            (mlp.router, FewRowsRouter),
            (mlp.experts, PackedExperts),
        )
        if not all(_is_plain(part, kind) for part, kind in parts):
            return False
        if hidden_states.numel() // hidden_states.shape[-1] * mlp.router.top_k > MAX_CHOICES:
            return False
        return attention.takes(hidden_states) and _has_few_rows(hidden_states, *(part for part, _ in parts))


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
    if x.device.type != "cpu" or x.numel() > MAX_ROWS * x.shape[-1]:
        return False
    if not torch.is_grad_enabled():
        return True
    return not x.requires_grad and not any(t.requires_grad for module in modules for t in module.parameters())


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether nothing would be left out if its forward were not called."""
    # accelerate's hooks replace forward on the module itself.
    is_hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return type(module) is kind and not is_hooked


def _as(kind: type[nn.Module], module: nn.Module) -> nn.Module:
    """The same layer over the same parameters, of a class that only computes it otherwise."""
    made = copy(module)
    made.__class__ = kind
    return made
