"""Adapted layers that compute with the merged weight: what a merged checkpoint holds, rounded as it is there.

Attached layers stay what they are, with PEFT's names and shapes, so that adapters are saved and loaded as always; only
their forward passes change. Gradients go straight through the rounding.
"""

from typing import Any

from peft import PeftModel
from peft.tuners.lora.layer import Linear, LoraLayer, ParamWrapper
from torch import Tensor
from torch.func import functional_call

from gptoss_ft.adapters.attach import lora_layers
from gptoss_ft.adapters.experts import ExpertsLora
from gptoss_ft.adapters.linear import FrozenLinearLora
from gptoss_ft.kernels.linear import merged_linear, merged_weight
from gptoss_ft.model.experts import PackedExperts


def compute_merged(model: PeftModel) -> PeftModel:
    """Let every adapted layer of `model` compute with its merged weight from now on; returns the model.

    Experts compute with MXFP4 numbers, attention and router with bf16 ones, as every merged MXFP4 format stores them.

    Raises:
        ValueError: if experts are not packed, or a layer has dropout, which no merged weight has.
    """
    for (number, name), layer in lora_layers(model).items():
        if any(getattr(dropout, "p", 0.0) for dropout in layer.lora_dropout.values()):
            raise ValueError(f"{name} of layer {number} has dropout, which cannot be merged")
        if isinstance(layer, ExpertsLora):
            if not isinstance(layer.get_base_layer(), PackedExperts):
                raise ValueError(f"the experts of layer {number} are not packed, and cannot be rounded to MXFP4")
            layer.merged_forward = True
        else:
            # Its class alone decides what it computes.
            layer.__class__ = _COMPUTING_MERGED[type(layer)]
    return model


def computes_merged(model: PeftModel) -> bool:
    """Whether `compute_merged` changed the model."""
    return any(getattr(layer, "merged_forward", False) for layer in lora_layers(model).values())


class MergedLinear(Linear):
    """PEFT's LoRA linear layer, computing with the merged weight."""

    merged_forward = True

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`[..., in] -> [..., out]`"""
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        return merged_linear(x, self.base_layer.weight, self.base_layer.bias, *_factors(self))


class MergedParameter(ParamWrapper):
    """PEFT's LoRA of a small parameter, such as the router's weight, with the update merged into it."""

    merged_forward = True

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the wrapped module returns."""
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        merged = merged_weight(self.get_param(), *_factors(self))
        return functional_call(self.base_layer, {self.parameter_name: merged}, (x, *args), kwargs)


_COMPUTING_MERGED: dict[type[LoraLayer], type[LoraLayer]] = {
    FrozenLinearLora: MergedLinear,
    Linear: MergedLinear,
    ParamWrapper: MergedParameter,
}


def _factors(layer: LoraLayer) -> tuple[Tensor, Tensor, float]:
    (name,) = layer.active_adapters
    return layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
