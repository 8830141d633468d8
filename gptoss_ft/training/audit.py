"""Did every tensor that should learn get a gradient? Asked of the first two optimiser steps, and answered by count."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gptoss_ft.adapters.attach import lora_layers
from gptoss_ft.adapters.experts import ExpertsLora
from gptoss_ft.training.run_folder import write_json


@dataclass(frozen=True)
class GradientAudit:
    """What the audit found: adapter tensors with a gradient, and experts that no token with loss has reached."""

    num_tensors: int
    num_expert_tensors: int
    experts_without_tokens: dict[str, list[int]]

    def __str__(self) -> str:
        text = f"all {self.num_tensors} adapter tensors have a gradient"
        if self.num_expert_tensors:
            text += f", in them {self.num_expert_tensors} of single experts"
        unreached = sum(map(len, self.experts_without_tokens.values()))
        return text + (f"; {unreached} expert stacks got no token yet" if unreached else "")


class AuditCallback(TrainerCallback):
    """Looks at the gradients of the first two optimiser steps, writes what it finds, and stops if one is missing.

    B is zero when training starts, so A can only have a gradient once B has moved: the first step shows B's
    gradients and the second shows A's.

    Raises:
        ValueError: from `on_pre_optimizer_step`, naming the first tensors with no or a non-finite gradient.
    """

    def __init__(self, model: PeftModel, path: Path) -> None:
        self.model = model
        self.path = path
        self.result: GradientAudit | None = None
        self._first_step: int | None = None
        _watch(model)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._first_step is None:
            self._first_step = state.global_step
        if state.global_step > self._first_step + 1:
            return
        first = state.global_step == self._first_step
        self.result = audit_gradients(self.model, matrices=("lora_B",) if first else ("lora_A", "lora_B"))
        if state.is_world_process_zero:
            write_json(self.path, asdict(self.result))
        if first:
            _watch(self.model)
        else:
            _unwatch(self.model)
            if state.is_world_process_zero:
                print(f"gradient audit: {self.result}")


def audit_gradients(model: PeftModel, *, matrices: tuple[str, ...] = ("lora_A", "lora_B")) -> GradientAudit:
    """Check the gradients that a backward pass has left on every adapter tensor.

    A stack of experts is checked expert by expert, for those that a token with loss has reached.

    Raises:
        ValueError: naming the first tensors whose gradient is missing, zero or not finite.
    """
    failed: list[str] = []
    unreached: dict[str, list[int]] = {}
    num_tensors = num_expert_tensors = 0
    for (number, target), layer in lora_layers(model).items():
        where = f"layer {number} {target}"
        for matrix in matrices:
            for linear in getattr(layer, matrix).values():
                num_tensors += 1
                if not isinstance(layer, ExpertsLora):
                    failed += [] if _has_gradient(linear.weight.grad) else [f"{where} {matrix}"]
                    continue
                reached = _reached(layer)
                grads = _by_expert(linear.weight.grad, matrix, layer)
                num_expert_tensors += len(reached)
                failed += [f"{where} {matrix} expert {e}" for e in reached if grads is None or not _has_gradient(grads[e])]
        if isinstance(layer, ExpertsLora):
            missed = sorted(_trained(layer) - set(_reached(layer)))
            unreached |= {where: missed} if missed else {}
    if failed:
        raise ValueError(f"{len(failed)} adapter tensors got no gradient, first: {', '.join(failed[:5])}")
    return GradientAudit(num_tensors, num_expert_tensors, unreached)


def _watch(model: PeftModel) -> None:
    for layer in lora_layers(model).values():
        if isinstance(layer, ExpertsLora):
            layer.watch_experts()


def _unwatch(model: PeftModel) -> None:
    for layer in lora_layers(model).values():
        if isinstance(layer, ExpertsLora):
            layer.reached_E = None


def _trained(layer: ExpertsLora) -> set[int]:
    return set(layer.experts if layer.experts is not None else range(layer.get_base_layer().num_experts))


def _reached(layer: ExpertsLora) -> list[int]:
    if layer.reached_E is None:
        raise ValueError("nobody watched the experts of this forward pass: call watch_experts() first")
    return sorted(_trained(layer).intersection(layer.reached_E.nonzero().flatten().tolist()))


def _by_expert(grad: Tensor | None, matrix: str, layer: ExpertsLora) -> Tensor | None:
    if grad is None:
        return None
    num_experts = layer.get_base_layer().num_experts
    if matrix == "lora_A":
        return grad.view(num_experts, -1, grad.shape[1])
    return grad.view(grad.shape[0], -1, num_experts).permute(2, 0, 1)


def _has_gradient(grad: Tensor | None) -> bool:
    return grad is not None and bool(torch.isfinite(grad).all()) and bool(grad.any())
