"""How to round the experts of a trained model: for what they see of calibration rows, one decoder layer at a time.

T tokens · H hidden · K experts per token · N = T·K rows sorted by expert · E experts
"""

import re
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from tqdm import tqdm

from gptoss_ft.adapters.experts import ExpertsLora
from gptoss_ft.export.journal import Journal
from gptoss_ft.export.merged import PackedUpdate, over_rows, torch_threads
from gptoss_ft.kernels.reference import BLOCK_SIZE
from gptoss_ft.model.experts import projection_inputs
from gptoss_ft.mxfp4.calibrated import MIN_INPUTS, CalibratedRounding, trial_rows
from gptoss_ft.mxfp4.round import UpdateStats

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
    """Rounds the experts of `model` for their inputs, if asked in the order of its layers, as `MergedWeights` does.

    Uses as many of torch's threads as there are when it is made. See `LayerwiseInputs` for model and samples.

    Args:
        layers, experts: round experts of these numbers only; None stands for all.
        journal: where to keep what was rounded, and to take it from.
        num_elements: how many weights will be asked for, which is the whole of the progress bar and of the estimate
            that is printed; None shows neither.
    """

    def __init__(
        self,
        model: PeftModel,
        samples: Sequence[Sequence[int]],
        *,
        layers: Collection[int] | None = None,
        experts: Collection[int] | None = None,
        journal: Journal | None = None,
        num_elements: int | None = None,
    ) -> None:
        self.num_threads = torch.get_num_threads()
        self.layerwise = LayerwiseInputs(model, samples)
        self.inputs = NOTHING
        self.layers, self.experts = layers, experts
        self.journal = journal
        self.progress = Progress(num_elements, len(self.layerwise.layers))

    def __call__(
        self, name: str, expert: int, update: PackedUpdate, pool: ThreadPoolExecutor
    ) -> tuple[Tensor, Tensor, UpdateStats] | None:
        """Blocks, scales and how they compare with the update, of an expert of the stack with this HF weight name.

        None if it is not among those to be calibrated, or has too few inputs for it.

        Raises:
            RuntimeError: if a later layer was asked for before.
        """
        match = _WEIGHT.fullmatch(name)
        if match is None:
            raise ValueError(f"{name} is no stack of experts")
        layer, base = int(match["layer"]), (update.blocks, update.scales)
        if not is_selected(layer, expert, self.layers, self.experts):
            return None
        if self.journal and (noted := self.journal.read(name, expert, *base)):
            self.progress.skip(update)
            return noted
        with torch_threads(self.num_threads):
            inputs_NK = self._inputs_of(layer, match["projection"], expert)
        if len(inputs_NK) < MIN_INPUTS:
            self.progress.skip(update)
            return None
        started = perf_counter()
        rounded = round_for_inputs(inputs_NK, update, pool, self.num_threads)
        if self.journal:
            self.journal.write(name, expert, base, rounded)
        self.progress.rounded(update, perf_counter() - started)
        return rounded

    def _inputs_of(self, layer: int, projection: str, expert: int) -> Tensor:
        if layer < self.layerwise.next_layer - 1:
            raise RuntimeError(f"layer {layer} was asked for after layer {self.layerwise.next_layer - 1}")
        while self.layerwise.next_layer <= layer:
            self.inputs = NOTHING
            started = perf_counter()
            self.inputs = self.layerwise.advance()
            self.progress.seconds_per_layer = perf_counter() - started
        return self.inputs.of(projection, expert)


def round_for_inputs(
    inputs_NK: Tensor, update: PackedUpdate, pool: ThreadPoolExecutor, num_threads: int
) -> tuple[Tensor, Tensor, UpdateStats]:
    """Blocks, scales and how they compare with the update, of one expert that is given these inputs."""
    with torch_threads(num_threads):
        rows = trial_rows(len(update.blocks))
        rounding = CalibratedRounding(inputs_NK, (update.target(rows), update.blocks[rows], update.scales[rows]))
    return over_rows(update, rounding.round, pool)


def is_selected(layer: int, expert: int, layers: Collection[int] | None, experts: Collection[int] | None) -> bool:
    """Whether both numbers are among those given; None stands for all."""
    return (layers is None or layer in layers) and (experts is None or expert in experts)


class Progress:
    """A bar over the weights to be rounded, and one line that says how long it will take, once that can be measured."""

    seconds_per_layer = 0.0

    def __init__(self, num_elements: int | None, num_layers: int) -> None:
        self.num_layers, self.remaining, self.estimated = num_layers, num_elements or 0, num_elements is None
        self.bar = tqdm(
            total=self.remaining, desc="rounding", unit="", unit_scale=True, position=1, disable=num_elements is None
        )

    def skip(self, update: PackedUpdate) -> None:
        """Of an expert that took no time."""
        self.remaining -= _num_elements(update)
        self.bar.update(_num_elements(update))
        if self.remaining <= 0:
            self.bar.close()

    def rounded(self, update: PackedUpdate, seconds: float) -> None:
        """Of an expert that took this long."""
        self.skip(update)
        if not self.estimated:
            self.estimated = True
            rest = self.remaining * seconds / _num_elements(update)
            minutes = (rest + self.seconds_per_layer * (self.num_layers - 1)) / 60
            self.bar.write(f"calibrated rounding will take about {minutes:.1f} minutes more, by its first expert")


def _num_elements(update: PackedUpdate) -> int:
    return update.scales.numel() * BLOCK_SIZE


class _Recorder(nn.Module):
    """Stands in for a decoder layer and keeps what it is called with."""

    hidden: Tensor
    arguments: dict[str, Any]

    def forward(self, hidden: Tensor, **arguments: Any) -> Tensor:
        self.hidden, self.arguments = hidden, arguments
        return hidden
