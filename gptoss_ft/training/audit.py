"""Did every tensor that should learn get a gradient? Asked before the first optimiser steps, and answered by count."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gptoss_ft.adapters.attach import lora_layers
from gptoss_ft.adapters.experts import ExpertsLora
from gptoss_ft.errors import UserError
from gptoss_ft.training.run_folder import write_json

NOT_FINITE = "has a gradient that is not finite"


@dataclass(frozen=True)
class GradientAudit:
    """What the audit found.

    Attributes:
        num_tensors: adapter tensors with a gradient, a stack of experts being one.
        num_expert_tensors: single experts in these stacks, each with a gradient of its own.
        experts_without_tokens: by stack, the experts that no token with loss has reached.
    """

    num_tensors: int
    num_expert_tensors: int
    experts_without_tokens: dict[str, list[int]]

    def __str__(self) -> str:
        text = f"{self.num_tensors} adapter tensors have a gradient"
        if self.num_expert_tensors:
            text += f", and each of the {self.num_expert_tensors} experts in them that a token reached"
        unreached = sum(map(len, self.experts_without_tokens.values()))
        return text + (f"; {unreached} experts got no token in this step" if unreached else "")


class AuditCallback(TrainerCallback):
    """Looks at the gradients of the first step and of the first step after B has moved, and writes what it finds.

    B is zero when training starts, so A can have a gradient only after an optimiser step whose learning rate was
    not zero.

    Raises:
        ValueError: from `on_pre_optimizer_step`, as `audit_gradients` does.
    """

    def __init__(self, model: PeftModel, path: Path) -> None:
        self.model = model
        self.path = path
        self.result: GradientAudit | None = None
        self._done = False
        watch_experts(model)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._done:
            return
        share_reached(self.model)
        moved = any(bool(B.weight.any()) for layer in lora_layers(self.model).values() for B in layer.lora_B.values())
        if moved or self.result is None:
            self.result = audit_gradients(self.model)
            if state.is_world_process_zero:
                write_json(self.path, {"step": state.global_step, **asdict(self.result)})
        self._done = moved
        watch_experts(self.model, on=not moved)
        if moved and state.is_world_process_zero:
            # Above the progress bar rather than at its end.
            tqdm.write(f"gradient audit: {self.result}")


def watch_experts(model: PeftModel, *, on: bool = True) -> None:
    """Have every stack of experts note from now on which of them are reached, or stop it."""
    for layer in lora_layers(model).values():
        if isinstance(layer, ExpertsLora):
            layer.watch_experts(on=on)


def share_reached(model: PeftModel) -> None:
    """Have every process know which experts any of them has reached: their gradients are already averaged."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    for layer in lora_layers(model).values():
        if isinstance(layer, ExpertsLora) and layer.reached_E is not None:
            reached_E = layer.reached_E.to(next(layer.lora_A.parameters()).device, torch.int32)
            torch.distributed.all_reduce(reached_E, torch.distributed.ReduceOp.MAX)
            layer.reached_E = reached_E.bool().cpu()


def audit_gradients(model: PeftModel) -> GradientAudit:
    """Check the gradients that a backward pass has left: of every B, and of every A whose B is not zero.

    A stack of experts is checked expert by expert, for those that a token with loss has reached.

    Raises:
        ValueError: naming the first tensors whose gradient is missing or zero.
        UserError: likewise, if some are not finite.
    """
    failed: list[str] = []
    unreached: dict[str, list[int]] = {}
    num_tensors = num_expert_tensors = 0
    for (number, target), layer in lora_layers(model).items():
        where = f"layer {number} {target}"
        stacked = isinstance(layer, ExpertsLora)
        if stacked and (missed := sorted(_trained(layer) - set(_reached(layer)))):
            unreached[where] = missed
        for name in layer.lora_B:
            A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
            parts = {"lora_B": _parts(B, "lora_B", layer), "lora_A": _parts(A, "lora_A", layer)}
            moved = {e for e, (weight, _) in parts["lora_B"].items() if weight.any()}
            for matrix, experts in parts.items():
                checked = {e: grad for e, (_, grad) in experts.items() if matrix == "lora_B" or e in moved}
                faults = {f"{where} {matrix}{e}": _fault(grad) for e, grad in checked.items()}
                failed += [f"{tensor} {fault}" for tensor, fault in faults.items() if fault]
                num_tensors += bool(checked)
                num_expert_tensors += len(checked) if stacked else 0
    if failed:
        diverged = any(fault.endswith(NOT_FINITE) for fault in failed)
        cure = "; training diverged, lower trainer.learning_rate or adapter.alpha" if diverged else ""
        raise (UserError if diverged else ValueError)(
            f"{len(failed)} adapter tensors do not learn, first: {', '.join(failed[:3])}{cure}"
        )
    return GradientAudit(num_tensors, num_expert_tensors, unreached)


def _parts(weight: Tensor, matrix: str, layer: torch.nn.Module) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Weight and gradient, of the whole tensor or of each reached expert, by what follows the matrix's name."""
    if not isinstance(layer, ExpertsLora):
        return {"": (weight, weight.grad)}
    weights = layer.by_expert(weight, matrix)
    grads = None if weight.grad is None else layer.by_expert(weight.grad, matrix)
    return {f" expert {e}": (weights[e], None if grads is None else grads[e]) for e in _reached(layer)}


def _trained(layer: ExpertsLora) -> set[int]:
    return set(layer.experts if layer.experts is not None else range(layer.get_base_layer().num_experts))


def _reached(layer: ExpertsLora) -> list[int]:
    if layer.reached_E is None:
        raise ValueError("nobody watched the experts of this forward pass: call watch_experts first")
    return sorted(_trained(layer).intersection(layer.reached_E.nonzero().flatten().tolist()))


def _fault(grad: Tensor | None) -> str:
    if grad is None:
        return "has no gradient"
    if not grad.isfinite().all():
        return NOT_FINITE
    return "" if grad.any() else "has a gradient of zero"
