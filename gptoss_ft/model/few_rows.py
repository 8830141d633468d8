"""Layers that cost a step of generation one or two kernels where transformers composes them of slower operations.

They compute few rows on a CPU so, unless a gradient is wanted; everything else is transformers' own.
"""

from copy import copy

import torch
from torch import Tensor, nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm, GptOssTopKRouter

from gptoss_ft.kernels.cpu_norm import MAX_ROWS
from gptoss_ft.kernels.dispatch import linear, rms_norm


class FewRowsRMSNorm(GptOssRMSNorm):
    """`GptOssRMSNorm` in one kernel."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[..., H] -> [..., H]`"""
        if not _has_few_rows(hidden_states, self.weight):
            return super().forward(hidden_states)
        x_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        return rms_norm(x_TH, self.weight, self.variance_epsilon).view_as(hidden_states)


class FewRowsRouter(GptOssTopKRouter):
    """`GptOssTopKRouter` whose product is that of the other frozen layers."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`[T, H]` to the logits of all experts `[T, E]`, the weights of those chosen `[T, K]`, and their numbers."""
        if not _has_few_rows(hidden_states, self.weight, self.bias):
            return super().forward(hidden_states)
        logits_TE = linear(hidden_states, self.weight, self.bias)
        chosen_TK, experts_TK = logits_TE.topk(self.top_k, dim=-1)
        return logits_TE, chosen_TK.softmax(-1), experts_TK


def use_few_rows_layers(model: nn.Module) -> None:
    """Replace every `GptOssRMSNorm` and `GptOssTopKRouter` in `model`; parameters keep their names and memory."""
    kinds = {GptOssRMSNorm: FewRowsRMSNorm, GptOssTopKRouter: FewRowsRouter}
    for name, module in list(model.named_modules()):
        if kind := kinds.get(type(module)):
            model.set_submodule(name, _as(kind, module))


def _has_few_rows(x: Tensor, *parameters: Tensor) -> bool:
    if x.device.type != "cpu" or x.numel() > MAX_ROWS * x.shape[-1]:
        return False
    return not torch.is_grad_enabled() or not any(t.requires_grad for t in (x, *parameters))


def _as(kind: type[nn.Module], module: nn.Module) -> nn.Module:
    """The same layer over the same parameters, of a class that only computes it otherwise."""
    made = copy(module)
    made.__class__ = kind
    return made
