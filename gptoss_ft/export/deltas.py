"""Low-rank updates of a checkpoint's weights, and whether they fit it.

Shapes: E experts · O out rows · K in columns · r rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from gptoss_ft.errors import UserError
from gptoss_ft.model.spec import GptOssSpec


@dataclass(frozen=True)
class LowRankDelta:
    """The update scaling · B A of a weight [O, K], or one for each expert of a stack.

    Attributes:
        A: [r, K] or [E, r, K].
        B: [O, r] or [E, O, r].
    """

    A: Tensor
    B: Tensor
    scaling: float

    def factors(self, expert: int | None = None) -> tuple[Tensor, Tensor] | None:
        """B [O, r] and A [r, K] of a weight, or of one expert of a stack; None where their product is zero."""
        up, down = (self.B, self.A) if expert is None else (self.B[expert], self.A[expert])
        if self.scaling == 0 or not up.any() or not down.any():
            return None
        return up, down


def check_deltas(spec: GptOssSpec, deltas: Mapping[str, LowRankDelta]) -> None:
    """Raise UserError, naming the weight, unless every delta fits a weight of `spec` and is finite."""
    shapes = weight_shapes(spec)
    for name, delta in deltas.items():
        if name not in shapes:
            raise UserError(f"there is an update for {name}, which is no adaptable weight of this gpt-oss checkpoint")
        *experts, rows, columns = shapes[name]
        rank = delta.A.shape[-2] if delta.A.dim() > 1 else 0
        if (*delta.A.shape,) != (*experts, rank, columns) or (*delta.B.shape,) != (*experts, rows, rank):
            raise UserError(
                f"the update of {name} has A {list(delta.A.shape)} and B {list(delta.B.shape)}, which do not fit a "
                f"weight of shape {list(shapes[name])}: it was trained on another base"
            )
        if not (delta.A.isfinite().all() and delta.B.isfinite().all() and abs(delta.scaling) < float("inf")):
            raise UserError(f"the update of {name} holds NaN or infinite values: the training run diverged")


def weight_shapes(spec: GptOssSpec) -> dict[str, tuple[int, ...]]:
    """Every weight that can have an update, by HF name: [O, K], or [E, O, K] for expert stacks."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(spec.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        for name, shape in spec.linear_shapes().items():
            shapes[f"{prefix}.{name}.weight"] = shape
        for name, shape in spec.expert_shapes().items():
            shapes[f"{prefix}.mlp.experts.{name}"] = (spec.num_local_experts, *shape)
    return shapes


def update_experts(deltas: Mapping[str, LowRankDelta]) -> bool:
    """Whether any of the updates is of experts."""
    return any(".mlp.experts." in name for name in deltas)
