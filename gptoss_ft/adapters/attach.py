"""Attach LoRA to a base model, and count: every tensor that was asked for, or an error."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers import GptOssForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from gptoss_ft.adapters.experts import ExpertsLora, wrap_experts
from gptoss_ft.adapters.linear import FrozenLinearLora
from gptoss_ft.errors import UserError
from gptoss_ft.model.experts import PROJECTIONS, PackedExperts
from gptoss_ft.model.linear import FrozenLinear

ADAPTER_NAME = "default"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ROUTER = "router"
SHORTHANDS = {"attention": ATTENTION, "experts": PROJECTIONS, "all": (*ATTENTION, *PROJECTIONS)}


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What is adapted: projection names, and the layers and experts they are limited to (None: all)."""

    names: tuple[str, ...]
    layers: tuple[int, ...] | None = None
    experts: frozenset[int] | None = None

    @classmethod
    def parse(
        cls,
        targets: Sequence[str],
        *,
        num_layers: int,
        num_experts: int,
        layers: Sequence[int] | None = None,
        experts: Sequence[int] | None = None,
    ) -> "Targets":
        """Expand shorthands and check the numbers.

        Raises:
            UserError: naming the target, layer or expert that gpt-oss or this model does not have.
        """
        known = (*ATTENTION, ROUTER, *PROJECTIONS)
        wanted = {name for target in targets for name in SHORTHANDS.get(target, (target,))}
        for name in wanted.difference(known):
            raise UserError(f"adapter.targets has no {name!r}: choose from {', '.join((*SHORTHANDS, *known))}")
        if not wanted:
            raise UserError("adapter.targets is empty: name at least one, such as attention or experts")
        for key, numbers, count in (("layers", layers, num_layers), ("experts", experts, num_experts)):
            for number in numbers or ():
                if not 0 <= number < count:
                    raise UserError(f"adapter.{key} names {number}, but this model has {key} 0 to {count - 1}")
            if numbers is not None and not numbers:
                raise UserError(f"adapter.{key} is an empty list: leave it out (null) for all of them")
        if experts is not None and not wanted.intersection(PROJECTIONS):
            raise UserError("adapter.experts limits expert projections, but adapter.targets names none of them")
        return cls(
            names=tuple(name for name in known if name in wanted),
            layers=None if layers is None else tuple(sorted(set(layers))),
            experts=None if experts is None else frozenset(experts),
        )

    @property
    def modules(self) -> tuple[str, ...]:
        """Targets that are modules of their own: the attention projections."""
        return tuple(name for name in self.names if name in ATTENTION)

    @property
    def projections(self) -> tuple[str, ...]:
        """Targets that are stacks of experts."""
        return tuple(name for name in self.names if name in PROJECTIONS)

    def suffixes(self, *names: str) -> list[str]:
        """PEFT's suffix patterns for `names`: one each, or one for each chosen layer."""
        if self.layers is None:
            return list(names)
        owner = dict.fromkeys(ATTENTION, "self_attn.")
        return [f"layers.{layer}.{owner.get(name, '')}{name}" for layer in self.layers for name in names]


@dataclass(frozen=True)
class Attached:
    """What was attached: tensors per kind, layers, and the trainable numbers."""

    count_by_target: dict[str, int]
    num_layers: int
    num_parameters: int

    def __str__(self) -> str:
        kinds = ", ".join(f"{name} x {count}" for name, count in self.count_by_target.items())
        return f"LoRA on {kinds} in {self.num_layers} layers: {self.num_parameters:,} trainable parameters"


def attach_adapters(
    model: GptOssForCausalLM, targets: Targets, *, r: int, alpha: float, use_rslora: bool = False, dropout: float = 0.0
) -> tuple[PeftModel, Attached]:
    """Wrap `model` in PEFT with LoRA on `targets`.

    Args:
        dropout: on the attention projections' inputs; experts and router have none.

    Raises:
        ValueError: if anything that was asked for is missing afterwards.
    """
    config = LoraConfig(r=r, lora_alpha=alpha, use_rslora=use_rslora, lora_dropout=dropout, task_type="CAUSAL_LM")
    return attach_config(model, config, targets)


def attach_config(model: GptOssForCausalLM, config: LoraConfig, targets: Targets) -> tuple[PeftModel, Attached]:
    """`attach_adapters` with LoRA's settings taken from a PEFT config; its target fields are overwritten."""
    modules = targets.suffixes(*targets.modules)
    # PEFT's hook for layer types it does not know; it asks for a class and takes anything that builds a layer.
    config._register_custom_module({FrozenLinear: FrozenLinearLora})
    if targets.projections:
        modules += targets.suffixes("mlp.experts")
        wrap = partial(wrap_experts, projections=targets.projections, experts=targets.experts)
        config._register_custom_module({PackedExperts: wrap, GptOssExperts: wrap})
    config.target_modules = set(modules)
    config.target_parameters = targets.suffixes("mlp.router.weight") if ROUTER in targets.names else None
    if config.target_parameters and config.lora_dropout:
        raise UserError("adapter.dropout must be 0 when the router is targeted: PEFT has no dropout for parameters")
    peft_model = get_peft_model(model, config, adapter_name=ADAPTER_NAME)
    return peft_model, _count(peft_model, targets)


def lora_layers(model: nn.Module) -> dict[tuple[int, str], LoraLayer]:
    """Every LoRA layer of a model by (layer number, target name), in the model's order."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            parts = path.split(".")
            name = module.projection if isinstance(module, ExpertsLora) else parts[-1]
            found[int(parts[parts.index("layers") + 1]), name] = module
    return dict(sorted(found.items()))


def _count(model: PeftModel, targets: Targets) -> Attached:
    layers = range(model.config.num_hidden_layers) if targets.layers is None else targets.layers
    wanted = {(layer, name) for layer in layers for name in targets.names}
    found = lora_layers(model)
    if wanted != found.keys():
        missing, extra = sorted(wanted - found.keys()), sorted(found.keys() - wanted)
        raise ValueError(f"LoRA missed its targets (layer, name): missing {missing}, unasked {extra}")
    trainable = sum(_num_trained(layer) for layer in found.values())
    return Attached(dict(Counter(name for _, name in found)), len({layer for layer, _ in found}), trainable)


def _num_trained(layer: LoraLayer) -> int:
    numbers = sum(p.numel() for part in (layer.lora_A, layer.lora_B) for p in part.parameters() if p.requires_grad)
    if isinstance(layer, ExpertsLora) and layer.experts is not None:
        return numbers * len(layer.experts) // layer.get_base_layer().num_experts
    return numbers
