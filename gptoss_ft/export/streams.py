"""The trained and the merged model side by side on the same rows, a decoder layer at a time.

What rounding left of one layer reaches the experts of the next ones: they are given other inputs than in the trained
model, and are to put out on these what the trained model does. What a layer's output lacks all the same, because of the
routing or of layers before, its experts make good.

T tokens of all rows · H hidden · K experts per token · N = T·K rows sorted by expert · E experts
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from gptoss_ft.adapters.experts import ExpertsLora
from gptoss_ft.export.absorb import attention_corrections, router_correction
from gptoss_ft.export.deltas import LowRankDelta
from gptoss_ft.export.gguf_layout import through_q8_0
from gptoss_ft.export.layerwise import first_states
from gptoss_ft.export.merged import Rounded
from gptoss_ft.kernels.dispatch import merge_bf16
from gptoss_ft.model.checkpoint import Checkpoint
from gptoss_ft.model.experts import projection_inputs
from gptoss_ft.model.load import load_base


@dataclass(frozen=True)
class PairedInputs:
    """What a projection's experts are given in both models, rows `[N, in]`, of which expert e's end at `ends_E[e]`.

    Attributes:
        left: what else each row's output is to make good, `[N, out]`; None for nothing.
        weights: how much each counts, `[N]`; all the same if None.
    """

    trained: Tensor
    merged: Tensor
    ends_E: Sequence[int]
    left: Tensor | None = None
    weights: Tensor | None = None

    def of(self, expert: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """One expert's inputs in the trained and in the merged model, what else is to be made good, and weights."""
        rows = slice(self.ends_E[expert - 1] if expert else 0, self.ends_E[expert])
        left, weights = (None if part is None else part[rows] for part in (self.left, self.weights))
        return self.trained[rows], self.merged[rows], left, weights


class Streams:
    """Runs both models layer by layer, so that no more than one layer's inputs exist at a time.

    The merged model is the base with its attention and router merged, and with such experts as `write` says.

    Args:
        trained: on the CPU.
        base: its base, packed.
        deltas: its updates.
        samples: token ids of each calibration row; they are run one at a time, so there is no padding.
        q8_0: HF names of the weights outside the experts that the merged model's file holds in ggml's 8 bits.
        layers: those whose attention and router are corrected, once experts were written; None stands for all.
        weights: how much each token of each row counts for the experts; all the same if None.

    Attributes:
        corrected: weights and biases of the layer that was run last, as they are to be written, by HF name.
    """

    def __init__(
        self,
        trained: PeftModel,
        base: Checkpoint,
        deltas: Mapping[str, LowRankDelta],
        samples: Sequence[Sequence[int]],
        q8_0: Collection[str] = (),
        layers: Collection[int] | None = None,
        weights: Sequence[Sequence[float]] | None = None,
    ) -> None:
        model = trained.get_base_model()
        self.trained_layers, self.merged_layers = list(model.model.layers), list(load_base(base.path).model.layers)
        self.deltas, self.q8_0 = deltas, q8_0
        self.layers = layers
        self.weights_T = None if weights is None else torch.tensor([weight for row in weights for weight in row])
        self.number = -1
        # By row: what the next layer is given, of the merged model what its experts' outputs are added to.
        self.trained, self.arguments = first_states(model, samples, torch.bfloat16)
        self.merged = list(self.trained)
        if "model.embed_tokens.weight" in q8_0:
            self.merged = [_through_q8_0(embedded) for embedded in self.trained]
        self.trained_experts, self.merged_experts = _Watched(), _Watched()
        # Parameters of the merged layer and the data that each change of them replaced.
        self.mapped: list[tuple[nn.Parameter, Tensor]] = []
        self.corrected: dict[str, Tensor] = {}
        self.is_rounded = False

    def advance(self) -> None:
        """Run the next layer, that of the merged model as far as to its experts."""
        if self.number >= 0:
            self._close_merged()
        self.number += 1
        arguments = [by_layer[self.number] for by_layer in self.arguments]
        layer = self._open_merged()
        self.corrected = {}
        self.correct_attention(layer)
        self._narrow(layer)
        self.trained = self.trained_experts.run(self.trained_layers[self.number], self.trained, arguments)
        experts, layer.mlp.experts = layer.mlp.experts, _NoExperts()
        self.merged = self.merged_experts.run(layer, self.merged, arguments)
        layer.mlp.experts = experts
        self.correct_router(layer)

    @torch.no_grad()
    def inputs(self, projection: str) -> PairedInputs:
        """What this layer's experts are given of the tokens that the merged model's router sends them.

        Those of down_proj follow from what has been written of gate_up_proj.
        """
        hidden_TH, experts_TK, routing_TK = self.merged_experts.joined()
        merged, _ = projection_inputs(self.merged_layers[self.number].mlp.experts, hidden_TH, experts_TK)
        experts, low_rank = self.trained_layers[self.number].mlp.experts, {}
        if isinstance(experts, ExpertsLora):
            low_rank = {lora.projection: lora.low_rank() for lora in experts.nested()}
            experts = experts.get_base_layer()
        hidden_TH, *_ = self.trained_experts.joined()
        trained, ends_E = projection_inputs(experts, hidden_TH, experts_TK, low_rank)
        left = self._left(hidden_TH, experts_TK, routing_TK) if projection == "down_proj" else None
        weights = None if self.weights_T is None else _by_expert(self.weights_T, experts_TK)
        return PairedInputs(trained[projection], merged[projection], ends_E, left, weights)

    def _left(self, hidden_TH: Tensor, experts_TK: Tensor, routing_TK: Tensor) -> Tensor:
        """What a token still lacks for the trained layer's output if its experts put out what the trained ones do.

        A token's routing weights add up to one: it is had if each of its experts puts it out beside. `[N, H]`
        """
        out_TH = self.trained_layers[self.number].mlp.experts(hidden_TH, experts_TK, routing_TK)
        wanted_TH, before_TH = (torch.cat(rows, 1)[0] for rows in (self.trained, self.merged))
        left_TH = (wanted_TH.float() - before_TH.float() - out_TH.float()).to(out_TH.dtype)
        return _by_expert(left_TH, experts_TK)

    def write(self, projection: str, expert: int, rounded: Rounded) -> None:
        """What one expert of this layer is in the merged model, if not the base's."""
        experts = self.merged_layers[self.number].mlp.experts
        self.is_rounded = True
        for part in ("blocks", "scales", "bias"):
            getattr(experts, f"{projection}_{part}").data[expert] = getattr(rounded, part)

    def _open_merged(self) -> nn.Module:
        """This layer of the merged model, its updated parameters in memory of their own until `_close_merged`."""
        layer, prefix = self.merged_layers[self.number], f"model.layers.{self.number}."
        for name, parameter in layer.named_parameters():
            stack = prefix + name.rpartition("_")[0]
            delta = self.deltas.get(prefix + name) or self.deltas.get(stack)
            if delta is None:
                continue
            factors = None if stack in self.deltas else delta.factors()
            merged = None if factors is None else merge_bf16(parameter.data, factors[1], factors[0], delta.scaling)
            self._replace(parameter, parameter.data.clone() if merged is None else merged)
        return layer

    @property
    def is_corrected(self) -> bool:
        """Whether rounding has left anything that this layer is to be corrected for."""
        return self.is_rounded and (self.layers is None or self.number in self.layers)

    def correct_attention(self, layer: nn.Module) -> None:
        """Note what is corrected of the layer's attention, and put it in."""
        if self.is_corrected:
            self._put(attention_corrections(self.trained_layers[self.number], layer, self.trained, self.merged))

    def correct_router(self, layer: nn.Module) -> None:
        """The same of the router, which then chooses again."""
        if not self.is_corrected:
            return
        trained, merged = self.trained_layers[self.number].mlp.router, layer.mlp.router
        trained_rows, merged_rows = (
            [hidden_TH for hidden_TH, *_ in watched.calls] for watched in (self.trained_experts, self.merged_experts)
        )
        found = router_correction(trained, merged, trained_rows, merged_rows)
        if not found:
            return
        self._put({f"mlp.router.{part}": values for part, values in found.items()})
        with torch.no_grad():
            choices = [merged(hidden_TH) for hidden_TH in merged_rows]
        self.merged_experts.calls = [
            (hidden_TH, chosen_TK, scores_TK)
            for hidden_TH, (_, scores_TK, chosen_TK) in zip(merged_rows, choices, strict=True)
        ]

    def _put(self, found: Mapping[str, Tensor]) -> None:
        """Note tensors by their names in this layer, and put them in."""
        for name, values in found.items():
            self.corrected[f"model.layers.{self.number}.{name}"] = values
            self._replace(self.merged_layers[self.number].get_parameter(name), values)

    def _narrow(self, layer: nn.Module) -> None:
        """Leave of the layer's weights what the merged model's file does."""
        for name, parameter in layer.named_parameters():
            if f"model.layers.{self.number}.{name}" in self.q8_0:
                self._replace(parameter, _through_q8_0(parameter.data))

    def _replace(self, parameter: nn.Parameter, data: Tensor) -> None:
        self.mapped.append((parameter, parameter.data))
        parameter.data = data

    def _close_merged(self) -> None:
        """Run this layer's experts, as they have been written."""
        with torch.no_grad():
            out_TH = self.merged_layers[self.number].mlp.experts(*self.merged_experts.joined())
        sizes = [hidden.shape[1] for hidden in self.merged]
        self.merged = [hidden + out[None] for hidden, out in zip(self.merged, out_TH.split(sizes), strict=True)]
        for parameter, data in reversed(self.mapped):
            parameter.data = data
        self.mapped.clear()


def _by_expert(values_T: Tensor, experts_TK: Tensor) -> Tensor:
    """What belongs to tokens, for the rows of their experts."""
    order_N = experts_TK.reshape(-1).argsort(stable=True)
    return values_T[order_N // experts_TK.shape[1]]


def _through_q8_0(values: Tensor) -> Tensor:
    """What 8 bits leave of bf16 numbers, in bf16, whose own rounding is small beside that."""
    return through_q8_0(values).to(values.dtype)


class _Watched:
    """Runs layers and keeps what their experts are called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def run(self, layer: nn.Module, hidden: list[Tensor], arguments: list[dict[str, Any]]) -> list[Tensor]:
        """The outputs, by row."""
        self.calls = []
        hook = layer.mlp.experts.register_forward_pre_hook(lambda _, args: self.calls.append(args))
        with torch.no_grad():
            out = [layer(row, **named) for row, named in zip(hidden, arguments, strict=True)]
        hook.remove()
        return out

    def joined(self) -> tuple[Tensor, ...]:
        """Hidden states `[T, H]`, experts `[T, K]` and their weights `[T, K]` of all rows."""
        return tuple(torch.cat(parts) for parts in zip(*self.calls, strict=True))


class _NoExperts(nn.Module):
    """Experts that put out nothing."""

    def forward(self, hidden_TH: Tensor, experts_TK: Tensor, routing_weights_TK: Tensor) -> Tensor:
        return torch.zeros_like(hidden_TH)
