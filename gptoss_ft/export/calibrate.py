"""How to round the experts of a trained model: for what they see of calibration rows, one decoder layer at a time.

T tokens · H hidden · K experts per token · N = T·K rows sorted by expert · E experts
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from gptoss_ft.adapters.experts import ExpertsLora
from gptoss_ft.export.merged import torch_threads
from gptoss_ft.model.experts import projection_inputs
from gptoss_ft.mxfp4.calibrated import MIN_INPUTS, CalibratedRounding

_WEIGHT = re.compile(r"model\.layers\.(?P<layer>\d+)\.mlp\.experts\.(?P<projection>\w+)")


@dataclass(frozen=True)
class LayerInputs:
    """What a layer's experts are given: rows `[N, in]` by projection, of which expert e's end at `ends_E[e]`."""

    rows: dict[str, Tensor]
    ends_E: Sequence[int]

    def of(self, projection: str, expert: int) -> Tensor:
        """One expert's inputs."""
        return self.rows[projection][self.ends_E[expert - 1] if expert else 0 : self.ends_E[expert]]


NOTHING = LayerInputs({}, ())


class LayerwiseInputs:
    """Runs a model layer by layer, so that no more than one layer's inputs exist at a time.

    Args:
        model: on the CPU.
        samples: token ids of each calibration row; they are run one at a time, so there is no padding.
    """

    def __init__(self, model: PeftModel, samples: Sequence[Sequence[int]]) -> None:
        core = model.get_base_model().model
        self.layers = list(core.layers)
        self.next_layer = 0
        # By row: what the next layer is given, and the other arguments of every layer.
        self.hidden: list[Tensor] = []
        self.arguments: list[list[dict[str, Any]]] = []
        # The model makes masks and positions; in place of its layers, recorders note what it would call them with.
        recorders = [_Recorder() for _ in self.layers]
        core.layers = nn.ModuleList(recorders)
        try:
            with torch.no_grad():
                for ids in samples:
                    core(input_ids=torch.tensor([ids]), use_cache=False)
                    self.hidden.append(recorders[0].hidden)
                    self.arguments.append([recorder.arguments for recorder in recorders])
        finally:
            core.layers = nn.ModuleList(self.layers)

    def advance(self) -> LayerInputs:
        """Run the next layer; returns what its experts were given."""
        layer, seen = self.layers[self.next_layer], list[tuple[Tensor, Tensor]]()
        experts = layer.mlp.experts
        hook = experts.register_forward_pre_hook(lambda _, args: seen.append((args[0], args[1])))
        with torch.no_grad():
            for row, arguments in enumerate(self.arguments):
                self.hidden[row] = layer(self.hidden[row], **arguments[self.next_layer])
            hook.remove()
            hidden_TH, experts_TK = (torch.cat(parts) for parts in zip(*seen, strict=True))
            low_rank = {}
            if isinstance(experts, ExpertsLora):
                low_rank = {lora.projection: lora.low_rank() for lora in experts.nested()}
                experts = experts.get_base_layer()
            inputs = LayerInputs(*projection_inputs(experts, hidden_TH, experts_TK, low_rank))
        self.next_layer += 1
        return inputs


class Calibration:
    """Says how to round each expert of `model`, if asked in the order of its layers, as `MergedWeights` does.

    Uses as many of torch's threads as there are when it is made. See `LayerwiseInputs` for the arguments.
    """

    def __init__(self, model: PeftModel, samples: Sequence[Sequence[int]]) -> None:
        self.num_threads = torch.get_num_threads()
        self.layerwise = LayerwiseInputs(model, samples)
        self.inputs = NOTHING

    def __call__(self, name: str, expert: int) -> CalibratedRounding | None:
        """For an expert of the stack with this HF weight name; None if it has too few inputs to calibrate on.

        Raises:
            RuntimeError: if a later layer was asked for before.
        """
        with torch_threads(self.num_threads):
            inputs_NK = self._inputs_of(name, expert)
            return CalibratedRounding(inputs_NK) if len(inputs_NK) >= MIN_INPUTS else None

    def _inputs_of(self, name: str, expert: int) -> Tensor:
        match = _WEIGHT.fullmatch(name)
        if match is None:
            raise ValueError(f"{name} is no stack of experts")
        layer = int(match["layer"])
        if layer < self.layerwise.next_layer - 1:
            raise RuntimeError(f"{name} was asked for after layer {self.layerwise.next_layer - 1}: layers must rise")
        while self.layerwise.next_layer <= layer:
            self.inputs = NOTHING
            self.inputs = self.layerwise.advance()
        return self.inputs.of(match["projection"], expert)


class _Recorder(nn.Module):
    """Stands in for a decoder layer and keeps what it is called with."""

    hidden: Tensor
    arguments: dict[str, Any]

    def forward(self, hidden: Tensor, **arguments: Any) -> Tensor:
        self.hidden, self.arguments = hidden, arguments
        return hidden
