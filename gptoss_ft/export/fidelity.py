"""What a merged model keeps of the training, measured on rows from its files before anyone is served with it.

Trained model, base and export run side by side in fp32 on the CPU, a decoder layer at a time. The first two are the
base's mapped files with and without the adapter beside them, as they were in training; the export is read back.

T tokens · H hidden · P positions · K in columns · O out rows · N inputs of a weight
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gptoss_ft.adapters.merged import compute_merged
from gptoss_ft.adapters.save import load_adapter
from gptoss_ft.export.deltas import LowRankDelta
from gptoss_ft.export.distance import Distances, fidelity, quantile
from gptoss_ft.export.excerpts import Excerpt
from gptoss_ft.export.layerwise import first_states
from gptoss_ft.export.stored_model import Stored, StoredModel, head_logits, widened
from gptoss_ft.export.weights import expert_weight
from gptoss_ft.model.checkpoint import Checkpoint
from gptoss_ft.model.experts import PROJECTIONS, projection_inputs
from gptoss_ft.model.load import load_base

# Positions whose logits exist at once: 103 MB for each model.
CHUNK_POSITIONS = 128
# Inputs that an update's outputs are compared on; more cost time and hardly move a sum over thousands of rows.
MAX_INPUTS = 64


@dataclass(frozen=True)
class LayerDistance:
    """|h - h*| / |h*| of a decoder layer's outputs over all tokens, h* the trained model's."""

    exported: float
    base: float


@dataclass
class OutputError:
    """Squared norms over inputs x of a weight: what is wrong with its outputs, (W' - W - D) x + b' - b, and D x itself.

    Of biases b, those of experts, attention and routers may be corrected.
    """

    error_sq: float = 0.0
    update_sq: float = 0.0

    @property
    def relative(self) -> float | None:
        """1 where the update is lost; None where nothing was compared."""
        return (self.error_sq / self.update_sq) ** 0.5 if self.update_sq else None


@dataclass(frozen=True)
class Fidelity:
    """How far an export is from the trained model, with the base's distance for scale.

    Attributes:
        num_tokens, num_rows: what was run; the distances of logits are of the positions that carry loss.
        layers: by number.
        output_errors: by HF weight name, of those that have an update, over what they were given of these rows.
    """

    num_tokens: int
    num_rows: int
    exported: Distances
    base: Distances
    layers: list[LayerDistance]
    output_errors: dict[str, OutputError]

    @property
    def share(self) -> float | None:
        return fidelity(self.base, self.exported)

    def __str__(self) -> str:
        (left, effect), (same, same_base) = (
            [quantile(distances.kl_nats, 0.5) for distances in (self.exported, self.base)],
            [distances.summary()["same_top_share"] for distances in (self.exported, self.base)],
        )
        head = "the training changes nothing" if self.share is None else f"fidelity {self.share:.3f}"
        last = self.layers[-1]
        return (
            f"{head} at {len(self.base.kl_nats)} positions of {self.num_rows} rows: median KL from the trained model "
            f"{left:.2g} nats, the base's {effect:.2g}; same top token {same:.1%}, the base's {same_base:.1%}; "
            f"last layer's outputs off by {last.exported:.2g}, the base's {last.base:.2g}"
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "fidelity": self.share,
            "num_tokens": self.num_tokens,
            "num_rows": self.num_rows,
            "num_positions": len(self.base.kl_nats),
            "distance_from_trained": {"export": self.exported.summary(), "base": self.base.summary()},
            "layer_output_distance": [vars(layer) for layer in self.layers],
            "output_error": {name: error.relative for name, error in self.output_errors.items()},
        }


def measure_fidelity(
    base: Checkpoint,
    adapter: Path,
    deltas: Mapping[str, LowRankDelta],
    export: Stored,
    excerpts: Sequence[Excerpt],
    *,
    merged_training: bool = False,
    progress: bool = True,
) -> Fidelity:
    """Run all three models over `excerpts`.

    Args:
        adapter: what training saved, in PEFT's layout, and `deltas` what it says.
        merged_training: it was trained through the rounding of its merge, see `compute_merged`; no outputs of updates
            are compared then, since what was trained is the rounded weight.
    """
    with torch.no_grad():
        run = _SideBySide(base, adapter, {} if merged_training else deltas, export, excerpts)
        if merged_training:
            compute_merged(run.model)
        numbers = range(base.spec.num_hidden_layers)
        for number in tqdm(numbers, "measuring fidelity", unit=" layers", disable=not progress):
            run.advance(number)
        exported, of_base = run.logit_distances()
    num_rows = len({excerpt.sample.row for excerpt in excerpts})
    num_tokens = sum(len(excerpt.input_ids_T) for excerpt in excerpts)
    return Fidelity(num_tokens, num_rows, exported, of_base, run.layers, run.output_errors)


@dataclass
class _States:
    """What the next layer is given, by excerpt `[1, T, H]`."""

    trained: list[Tensor]
    base: list[Tensor] = field(default_factory=list)
    exported: list[Tensor] = field(default_factory=list)


class _SideBySide:
    def __init__(
        self,
        base: Checkpoint,
        adapter: Path,
        deltas: Mapping[str, LowRankDelta],
        export: Stored,
        excerpts: Sequence[Excerpt],
    ) -> None:
        self.base, self.deltas, self.export, self.excerpts = base, deltas, export, excerpts
        precision = "bf16" if base.layout == "bf16" else "mxfp4"
        self.model, _ = load_adapter(load_base(base.path, precision=precision), adapter)
        core = self.model.get_base_model()
        self.stored = StoredModel(export, core.config)
        rows = [excerpt.input_ids_T for excerpt in excerpts]
        trained, self.arguments = first_states(core, rows, torch.float32)
        self.states = _States(
            trained, list(trained), [self.stored.embed(excerpt.input_ids_T)[None] for excerpt in excerpts]
        )
        self.layers: list[LayerDistance] = []
        self.output_errors = {name: OutputError() for name in deltas}

    def advance(self, number: int) -> None:
        """Run the next layer of all three."""
        layer = self.model.get_base_model().model.layers[number]
        prefix = f"model.layers.{number}."
        arguments = [by_layer[number] for by_layer in self.arguments]
        with widened(layer):
            with _inputs_of(layer, prefix, self.deltas) as inputs:
                self.states.trained = _run(layer, self.states.trained, arguments)
            with self.model.disable_adapter():
                self.states.base = _run(layer, self.states.base, arguments)
            self._compare_outputs(layer, prefix, inputs)
        self.states.exported = _run(self.stored.layer(number), self.states.exported, arguments)
        trained = self.states.trained
        self.layers.append(LayerDistance(_apart(self.states.exported, trained), _apart(self.states.base, trained)))

    def logit_distances(self) -> tuple[Distances, Distances]:
        """The export's and the base's distances from the trained model, once all layers have run."""
        core = self.model.get_base_model()
        head, vocab_size = core.lm_head.weight, core.config.vocab_size

        def logits(hidden_PH: Tensor) -> Tensor:
            return head_logits(core.model.norm(hidden_PH), vocab_size, lambda start, stop: head[start:stop])

        exported, of_base = [], []
        for number, excerpt in enumerate(self.excerpts):
            for positions in excerpt.positions_P.split(CHUNK_POSITIONS):
                trained_PV = logits(self.states.trained[number][0, positions])
                of_base.append(Distances.between(trained_PV, logits(self.states.base[number][0, positions])))
                found_PV = self.stored.logits(self.states.exported[number][0, positions])
                exported.append(Distances.between(trained_PV, found_PV))
        return Distances.join(exported), Distances.join(of_base)

    def _compare_outputs(self, layer: nn.Module, prefix: str, inputs: dict[str, list[Any]]) -> None:
        """Note how far the updates' outputs are off on what the trained model gave them."""
        experts = inputs.pop(f"{prefix}mlp.experts", [])
        for name, parts in inputs.items():
            self._compare(name, None, torch.cat(parts))
        if not experts:
            return
        hidden_TH, experts_TK = (torch.cat(parts) for parts in zip(*experts, strict=True))
        module = layer.mlp.experts
        low_rank = {lora.projection: lora.low_rank() for lora in module.nested()}
        rows, ends_E = projection_inputs(module.get_base_layer(), hidden_TH, experts_TK, low_rank)
        for projection in PROJECTIONS:
            name = f"{prefix}mlp.experts.{projection}"
            for expert, (start, stop) in enumerate(pairwise([0, *ends_E])):
                if name in self.deltas and start < stop:
                    self._compare(name, expert, rows[projection][start:stop])

    def _compare(self, name: str, expert: int | None, x_NK: Tensor) -> None:
        delta = self.deltas[name]
        factors = delta.factors(expert)
        if factors is None:
            return
        up, down = factors
        x_NK = x_NK[:MAX_INPUTS].float()
        update_NO = delta.scaling * (x_NK @ down.float().T) @ up.float().T
        applied_OK = _weight(self.export, name, expert) - _weight(self.base, name, expert)
        applied_NO = x_NK @ applied_OK.T + _bias(self.export, name, expert) - _bias(self.base, name, expert)
        found = self.output_errors[name]
        found.error_sq += float((applied_NO - update_NO).square().sum())
        found.update_sq += float(update_NO.square().sum())


def _weight(files: Stored, name: str, expert: int | None) -> Tensor:
    return files.read(name).float() if expert is None else expert_weight(files, name, expert)


def _bias(files: Stored, name: str, expert: int | None) -> Tensor:
    if expert is None:
        return files.read(f"{name.removesuffix('weight')}bias").float()
    return files.read(f"{name}_bias", expert, expert + 1)[0].float()


def _apart(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Relative, over all tokens."""
    pairs = list(zip(found, wanted, strict=True))
    error_sq = sum(float((f - w).double().square().sum()) for f, w in pairs)
    return (error_sq / sum(float(w.double().square().sum()) for _, w in pairs)) ** 0.5


def _run(layer: nn.Module, states: list[Tensor], arguments: list[dict[str, Any]]) -> list[Tensor]:
    return [layer(hidden, **named) for hidden, named in zip(states, arguments, strict=True)]


@contextmanager
def _inputs_of(layer: nn.Module, prefix: str, deltas: Mapping[str, LowRankDelta]) -> Iterator[dict[str, list[Any]]]:
    """Collect what the layer's adapted weights are given: by weight name `[N, K]`, and for the stack of experts its
    rows and their choice of experts."""
    inputs: dict[str, list[Any]] = {}
    with ExitStack() as hooks:
        for path, module in layer.named_modules():
            name = f"{prefix}{path}"
            if path == "mlp.experts" and any(f"{name}.{projection}" in deltas for projection in PROJECTIONS):
                seen = inputs.setdefault(name, [])
                hooks.enter_context(
                    module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append((args[0], args[1])))
                )
            elif f"{name}.weight" in deltas:
                seen = inputs.setdefault(f"{name}.weight", [])
                hooks.enter_context(
                    module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].flatten(0, -2)))
                )
        yield inputs
