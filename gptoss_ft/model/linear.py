"""The linear layers of a frozen model, in kernels that suit the machine."""

from torch import Tensor, nn

from gptoss_ft.kernels.linear import frozen_linear


class FrozenLinear(nn.Linear):
    """`nn.Linear` by `frozen_linear`, until someone trains its weight or bias."""

    @property
    def is_frozen(self) -> bool:
        """Whether neither weight nor bias is trained."""
        return not any(parameter.requires_grad for parameter in self.parameters())

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in] -> [..., out]`"""
        return frozen_linear(x, self.weight, self.bias) if self.is_frozen else super().forward(x)

    @classmethod
    def of(cls, linear: nn.Linear) -> "FrozenLinear":
        """The same layer over the same parameters."""
        made = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        made.weight, made.bias = linear.weight, linear.bias
        return made.train(linear.training)


def use_frozen_linear(model: nn.Module) -> None:
    """Replace every plain `nn.Linear` in `model`; parameters keep their names and memory."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            model.set_submodule(name, FrozenLinear.of(module))
