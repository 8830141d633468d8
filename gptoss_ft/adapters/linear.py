"""PEFT's LoRA layer of a frozen linear layer, computed in the kernels that suit the machine."""

from typing import Any

from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from gptoss_ft.kernels.linear import adapted_linear
from gptoss_ft.model.linear import FrozenLinear


class FrozenLinearLora(Linear):
    """Everything of PEFT's layer but its arithmetic on a CPU, around a `FrozenLinear`.

    PEFT multiplies in the adapters' fp32, for which it converts input and output, and adds up in memory of its own.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`[..., in] -> [..., out]`; whatever is not one plain adapter over a frozen layer is left to PEFT."""
        adapter, base = self._plain_adapter(), self.base_layer
        is_frozen = isinstance(base, FrozenLinear) and base.is_frozen
        if adapter is None or not is_frozen or args or kwargs or x.device.type != "cpu":
            return super().forward(x, *args, **kwargs)
        A, B = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        return adapted_linear(x, base.weight, base.bias, A, B, self.scaling[adapter])

    def _plain_adapter(self) -> str | None:
        """The only active adapter, if nothing is to be done but what LoRA's paper says."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or len(active) != 1:
            return None
        (name,) = active
        dropout = self.lora_dropout[name]
        drops = self.training and not isinstance(dropout, nn.Identity)
        return None if drops or name in self.lora_variant or self.lora_bias[name] else name
