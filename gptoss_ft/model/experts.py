"""The stacked experts of a layer as modules: packed MXFP4, or transformers' own dense ones, one forward for both."""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from gptoss_ft.kernels.experts import ExpertProjection, expert_block, expert_inputs
from gptoss_ft.kernels.low_rank import LowRank
from gptoss_ft.kernels.reference import BLOCK_SIZE, MXFP4Weight

PROJECTIONS = ("gate_up_proj", "down_proj")


class PackedExperts(nn.Module):
    """Drop-in for `GptOssExperts` whose weights stay the checkpoint's MXFP4 bytes; they are frozen.

    Parameters carry the published names: `{gate_up,down}_proj_{blocks,scales,bias}`.
    """

    def __init__(self, config: GptOssConfig) -> None:
        super().__init__()
        self.num_experts = config.num_local_experts
        self.hidden_size, self.intermediate_size = config.hidden_size, config.intermediate_size
        self.alpha, self.limit = config.swiglu_alpha, config.swiglu_limit
        for name in PROJECTIONS:
            num_out, num_in = projection_shape(self, name)
            groups = num_in // BLOCK_SIZE
            for suffix, shape in (("blocks", (num_out, groups, BLOCK_SIZE // 2)), ("scales", (num_out, groups))):
                packed = torch.empty(self.num_experts, *shape, dtype=torch.uint8)
                setattr(self, f"{name}_{suffix}", nn.Parameter(packed, requires_grad=False))
            setattr(self, f"{name}_bias", nn.Parameter(torch.empty(self.num_experts, num_out), requires_grad=False))

    def forward(self, hidden_TH: Tensor, experts_TK: Tensor, routing_weights_TK: Tensor) -> Tensor:
        return experts_forward(self, hidden_TH, experts_TK, routing_weights_TK)

    def packed(self, name: str) -> tuple[MXFP4Weight, Tensor]:
        """The weight and bias of a projection."""
        weight = MXFP4Weight(getattr(self, f"{name}_blocks"), getattr(self, f"{name}_scales"))
        return weight, getattr(self, f"{name}_bias")

    def extra_repr(self) -> str:
        return f"{self.num_experts} experts, {self.hidden_size} -> {self.intermediate_size}, MXFP4"


Experts: TypeAlias = PackedExperts | GptOssExperts


def projection_shape(experts: Experts, name: str) -> tuple[int, int]:
    """(out, in) features of a projection, whatever the orientation of its storage."""
    hidden, intermediate = experts.hidden_size, experts.intermediate_size
    return (2 * intermediate, hidden) if name == "gate_up_proj" else (hidden, intermediate)


def experts_forward(
    experts: Experts,
    hidden_TH: Tensor,
    experts_TK: Tensor,
    routing_weights_TK: Tensor,
    low_rank: Mapping[str, Sequence[LowRank]] | None = None,
    *,
    merged: bool = False,
) -> Tensor:
    """`GptOssExperts.forward` with optional LoRA per projection name, over packed or dense weights: `[T, H]`.

    With `merged` the weights are packed, and multiplied with their updates merged into them and rounded.
    """
    gate_up, down = (_projection(experts, name, (low_rank or {}).get(name, ()), merged) for name in PROJECTIONS)
    return expert_block(
        hidden_TH, experts_TK, routing_weights_TK, gate_up, down, alpha=experts.alpha, limit=experts.limit
    )


def projection_inputs(
    experts: Experts,
    hidden_TH: Tensor,
    experts_TK: Tensor,
    low_rank: Mapping[str, Sequence[LowRank]] | None = None,
) -> tuple[dict[str, Tensor], list[int]]:
    """What each projection is given in `experts_forward`, rows sorted by expert, and where each expert's rows end."""
    gate_up = _projection(experts, "gate_up_proj", (low_rank or {}).get("gate_up_proj", ()))
    x_NH, act_NI, ends_E = expert_inputs(hidden_TH, experts_TK, gate_up, alpha=experts.alpha, limit=experts.limit)
    return {"gate_up_proj": x_NH, "down_proj": act_NI}, ends_E


def _projection(experts: Experts, name: str, low_rank: Sequence[LowRank], merged: bool = False) -> ExpertProjection:
    if isinstance(experts, PackedExperts):
        weight = MXFP4Weight(getattr(experts, f"{name}_blocks"), getattr(experts, f"{name}_scales"))
    else:
        weight = getattr(experts, name)
    return ExpertProjection(weight, getattr(experts, f"{name}_bias"), low_rank, merged and bool(low_rank))
