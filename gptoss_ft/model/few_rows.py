"""Parts of layers that cost a step of generation a kernel or two where transformers composes slower operations.

They compute few rows on a CPU so, unless a gradient is wanted; everything else is transformers' own.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, GptOssRMSNorm, GptOssTopKRouter
from transformers.utils import output_capturing

from gptoss_ft.kernels.cpu_library import MAX_TOKENS
from gptoss_ft.kernels.dispatch import attention_inputs, linear, rms_norm
from gptoss_ft.model.attention import ATTENTION, attention_forward
from gptoss_ft.model.linear import FrozenLinear


class FewRowsRMSNorm(GptOssRMSNorm):
    """`GptOssRMSNorm` in one kernel."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[..., H] -> [..., H]`"""
        if not has_few_rows(hidden_states, self):
            return super().forward(hidden_states)
        x_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        return rms_norm(x_TH, self.weight, self.variance_epsilon).view_as(hidden_states)


class FewRowsRouter(GptOssTopKRouter):
    """`GptOssTopKRouter` whose product is that of the other frozen layers."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`[T, H]` to the logits of all experts `[T, E]`, the weights of those chosen `[T, K]`, and their numbers."""
        if not has_few_rows(hidden_states, self):
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
        if self.config._attn_implementation != ATTENTION or not all(is_plain(p, FrozenLinear) for p in projections):
            return False
        return has_few_rows(hidden_states, *projections)


def has_few_rows(x: Tensor, *modules: nn.Module) -> bool:
    """Whether rows `[..., features]` are few enough for the kernels, on a CPU, and no gradient is wanted."""
    if x.device.type != "cpu" or x.numel() > MAX_TOKENS * x.shape[-1]:
        return False
    if not torch.is_grad_enabled():
        return True
    return not x.requires_grad and not any(t.requires_grad for module in modules for t in module.parameters())


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether nothing would be left out if its forward were not called."""
    if type(module) is not kind or module._forward_pre_hooks:
        return False
    # accelerate's hooks replace forward on the module itself, and put back what they found when they are removed.
    if "forward" in vars(module) and vars(module)["forward"] != MethodType(kind.forward, module):
        return False
    return not module._forward_hooks or all(map(_is_idle, module._forward_hooks.values()))


def _is_idle(hook: Callable[..., Any]) -> bool:
    """Whether it is one that transformers left behind when it was once asked for hidden states or router logits."""
    return getattr(hook, "__module__", "") == output_capturing.__name__ and not output_capturing._active_collector.get()
