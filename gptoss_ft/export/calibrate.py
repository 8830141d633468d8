"""How to round the experts of a trained model: for what they see of calibration rows, one decoder layer at a time."""

import re
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter

import torch
from peft import PeftModel
from torch import Tensor
from tqdm import tqdm

from gptoss_ft.export.cures import Limits
from gptoss_ft.export.deltas import LowRankDelta
from gptoss_ft.export.journal import Journal
from gptoss_ft.export.merged import PackedUpdate, Rounded, torch_threads
from gptoss_ft.export.paired import round_paired
from gptoss_ft.export.streams import PairedInputs, Streams
from gptoss_ft.kernels.reference import BLOCK_SIZE
from gptoss_ft.model.checkpoint import Checkpoint
from gptoss_ft.mxfp4.calibrated import MIN_INPUTS

_CORRECTED = re.compile(r"model\.layers\.(?P<layer>\d+)\.(self_attn\.[qkv]_proj|mlp\.router)\.(weight|bias)")
_WEIGHT = re.compile(r"model\.layers\.(?P<layer>\d+)\.mlp\.experts\.(?P<projection>\w+)")


class Calibration:
    """Rounds the experts of `model` for their inputs, if asked in the order of its layers, as `MergedWeights` does.

    Uses as many of torch's threads as there are when it is made. See `Streams` for the first four arguments, `q8_0`
    and `weights`.

    Args:
        layers, experts: round experts of these numbers only, and correct attention and router of these layers only;
            None stands for all.
        journal: where to keep what was rounded, and to take it from.
        num_elements: how many weights will be asked for, which is the whole of the progress bar and of the estimate
            that is printed; None shows neither.
        all_rows: `samples` are all that there are.

    Attributes:
        few_inputs, limits: see `Calibrate`.
    """

    def __init__(
        self,
        model: PeftModel,
        base: Checkpoint,
        deltas: Mapping[str, LowRankDelta],
        samples: Sequence[Sequence[int]],
        *,
        layers: Collection[int] | None = None,
        experts: Collection[int] | None = None,
        journal: Journal | None = None,
        num_elements: int | None = None,
        q8_0: Collection[str] = (),
        weights: Sequence[Sequence[float]] | None = None,
        all_rows: bool = False,
    ) -> None:
        self.num_threads = torch.get_num_threads()
        self.streams = Streams(model, base, deltas, samples, q8_0, layers, weights)
        self.has_experts = any(_WEIGHT.fullmatch(name) for name in deltas)
        # Of one projection, by its weight name.
        self.inputs: dict[str, PairedInputs] = {}
        # Corrected ones, by HF name: a few KB a layer.
        self.biases: dict[str, Tensor] = {}
        self.few_inputs: dict[str, list[int]] = {}
        self.layers, self.experts = layers, experts
        self.limits = Limits(restricted=layers is not None or experts is not None, all_rows=all_rows)
        self.last_layer = max(layers) if layers else base.spec.num_hidden_layers - 1
        self.journal = journal
        self.progress = Progress(num_elements, base.spec.num_hidden_layers)

    def __call__(self, name: str, expert: int, update: PackedUpdate, pool: ThreadPoolExecutor) -> Rounded | None:
        """An expert of the stack with this HF weight name.

        None if it is not among those to be calibrated, or has too few inputs for it.

        Raises:
            RuntimeError: if a later layer was asked for before.
        """
        layer, projection = self._reach(name)
        if not is_selected(layer, expert, self.layers, self.experts):
            return None
        if self.journal and (noted := self.journal.read(name, expert, update)):
            self.progress.skip(update)
            return noted
        if name not in self.inputs:
            self.inputs.clear()
            with torch_threads(self.num_threads):
                self.inputs[name] = self.streams.inputs(projection)
        trained_NK, merged_NK, left_NO, weights_N = self.inputs[name].of(expert)
        if len(merged_NK) < MIN_INPUTS:
            self.few_inputs.setdefault(name, []).append(expert)
            self.progress.skip(update)
            return None
        started = perf_counter()
        rounded = round_paired(trained_NK, merged_NK, update, pool, self.num_threads, left_NO, weights_N)
        if self.journal:
            self.journal.write(name, expert, update, rounded)
        self.progress.rounded(update, perf_counter() - started)
        return rounded

    def written(self, name: str, expert: int, rounded: Rounded) -> None:
        """Notes what the merged model has, for the inputs of what follows."""
        layer, projection = self._reach(name)
        if layer <= self.last_layer:
            self.streams.write(projection, expert, rounded)

    def corrected(self, name: str) -> Tensor | None:
        """The tensor with this HF name as it is to be written, bf16; None if as base and update have it.

        Raises:
            RuntimeError: if a later layer was asked for before.
        """
        match = _CORRECTED.fullmatch(name)
        if match is None or not self.has_experts:
            return None
        layer = int(match["layer"])
        # Files have tensors of odd sizes, as biases may be, behind those of later layers.
        if name.endswith(".bias") and layer < self.streams.number:
            return self.biases.get(name)
        self._run_to(layer)
        return self.streams.corrected.get(name)

    def _reach(self, name: str) -> tuple[int, str]:
        """Run the models up to the layer of a stack; returns the layer's number, and which of its stacks it is."""
        match = _WEIGHT.fullmatch(name)
        if match is None:
            raise ValueError(f"{name} is no stack of experts")
        layer = int(match["layer"])
        self._run_to(layer)
        return layer, match["projection"]

    def _run_to(self, layer: int) -> None:
        if layer < self.streams.number:
            raise RuntimeError(f"layer {layer} was asked for after layer {self.streams.number}")
        while self.streams.number < min(layer, self.last_layer):
            self.inputs.clear()
            started = perf_counter()
            with torch_threads(self.num_threads):
                self.streams.advance()
            self.biases |= {name: b for name, b in self.streams.corrected.items() if name.endswith(".bias")}
            self.progress.seconds_per_layer = perf_counter() - started


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
