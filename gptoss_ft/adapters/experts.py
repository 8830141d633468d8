"""LoRA on the stacked experts as PEFT tuner layers that never form the dense update.

PEFT's own `target_parameters` adds B·A to the whole stack in every forward pass, and finds nothing to add to when the
weights are packed. These layers work on the activations instead and keep PEFT's names and shapes, so what they save
is what `target_parameters` would have saved:

    A  [R·E, in]   expert-major: row e·R + k
    B  [out, R·E]  expert fastest: column k·E + e
"""

import math
from collections.abc import Sequence

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from gptoss_ft.kernels.low_rank import LowRank
from gptoss_ft.model.experts import Experts, experts_forward, projection_shape


class ExpertsLora(nn.Module, LoraLayer):
    """LoRA of one projection of an expert stack; a second one wraps the first, as PEFT nests its parameter wrappers."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        projection: str,
        config: LoraConfig,
        experts: frozenset[int] | None = None,
    ) -> None:
        nn.Module.__init__(self)
        LoraLayer.__init__(self, base_layer)
        self.projection = projection
        self.experts = experts
        # Whether products see the update merged into the packed weights, rounded as an export rounds it.
        self.merged_forward = False
        # Which experts had a token that reached the loss; None while nobody watches.
        self.reached_E: Tensor | None = None
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config.r, config.lora_alpha, config)

    def _get_in_out_features(self, module: nn.Module) -> tuple[None, None]:
        return None, None  # known only with the projection, which PEFT's constructor does not have

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **_: object) -> None:
        """Create A (Kaiming) and B (zero) for `adapter_name`; a dropout in `config` is for other layers."""
        stack: Experts = self.get_base_layer()
        num_out, num_in = projection_shape(stack, self.projection)
        bias = getattr(stack, f"{self.projection}_bias")
        rows = r * stack.num_experts
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.use_rslora[adapter_name] = config.use_rslora
        self.use_dora[adapter_name] = self.lora_bias[adapter_name] = False
        # There is no place for dropout between stacked experts and their shared input rows in PEFT's layout.
        self.lora_dropout[adapter_name] = nn.Identity()
        self.lora_A[adapter_name] = nn.Linear(num_in, rows, bias=False, device=bias.device, dtype=bias.dtype)
        self.lora_B[adapter_name] = nn.Linear(rows, num_out, bias=False, device=bias.device, dtype=bias.dtype)
        self.reset_lora_parameters(adapter_name, init_lora_weights=True)
        self.set_adapter([adapter_name])

    def forward(self, hidden_TH: Tensor, experts_TK: Tensor, routing_weights_TK: Tensor) -> Tensor:
        low_rank = {} if self.disable_adapters else {layer.projection: layer.low_rank() for layer in self.nested()}
        out_TH = experts_forward(
            self.get_base_layer(), hidden_TH, experts_TK, routing_weights_TK, low_rank, merged=self.merged_forward
        )
        if out_TH.requires_grad and self.reached_E is not None:
            out_TH.register_hook(lambda grad_TH: self._note_reached(experts_TK, grad_TH))
        return out_TH

    def watch_experts(self, *, on: bool = True) -> None:
        """Note from now on, in `reached_E`, which experts have tokens whose outputs reach the loss."""
        self.reached_E = torch.zeros(self.get_base_layer().num_experts, dtype=torch.bool) if on else None

    def by_expert(self, tensor: Tensor, matrix: str) -> Tensor:
        """A view by expert of something in the layout of `lora_A`, `[E, R, in]`, or `lora_B`, `[E, out, R]`."""
        num_experts = self.get_base_layer().num_experts
        if matrix == "lora_A":
            return tensor.view(num_experts, -1, tensor.shape[1])
        return tensor.view(tensor.shape[0], -1, num_experts).permute(2, 0, 1)

    def nested(self) -> list["ExpertsLora"]:
        """This layer and the one it wraps, if any: one for each adapted projection."""
        inner = self.base_layer
        return [self, *inner.nested()] if isinstance(inner, ExpertsLora) else [self]

    def low_rank(self) -> Sequence[LowRank]:
        """The active adapters' updates, as views of their parameters."""
        return [
            LowRank(
                self.by_expert(self.lora_A[name].weight, "lora_A"),
                self.by_expert(self.lora_B[name].weight, "lora_B"),
                self.scaling[name],
                self.experts,
            )
            for name in self.active_adapters
            if name in self.lora_A
        ]

    def _note_reached(self, experts_TK: Tensor, grad_TH: Tensor) -> None:
        # Padding is routed too, and in the last layer so are prompts: their gradient is zero, no expert learns by it.
        reached_by = experts_TK[(grad_TH != 0).any(-1)].flatten().cpu()
        for layer in self.nested():
            if layer.reached_E is not None:
                layer.reached_E[reached_by] = True


def wrap_experts(
    target: nn.Module,
    adapter_name: str,
    config: LoraConfig,
    *,
    projections: Sequence[str],
    experts: frozenset[int] | None,
    **_: object,
) -> ExpertsLora:
    """Adapt `projections` of an expert stack; with both, gate_up is inside and down outside, which is PEFT's order."""
    for name in sorted(projections, reverse=True):
        target = ExpertsLora(target, adapter_name, name, config, experts)
    return target
