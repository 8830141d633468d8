"""The weights of base + updates, one expert at a time, in the form that a file asks for.

Shapes: E experts · O out rows · K in columns · r rank. Weights and updates are oriented [O, K] here; the bf16
layout stores experts transposed.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from gptoss_ft.export.cures import Limits
from gptoss_ft.export.deltas import LowRankDelta
from gptoss_ft.export.gguf_layout import through_q8_0
from gptoss_ft.kernels.codec import quantize_mxfp4
from gptoss_ft.kernels.dispatch import dequantize_mxfp4, merge_bf16, merge_mxfp4, merge_mxfp4_dithered
from gptoss_ft.kernels.reference import BLOCK_SIZE, MXFP4Weight
from gptoss_ft.model import layouts
from gptoss_ft.model.checkpoint import Checkpoint
from gptoss_ft.model.shards import Entry, Producer
from gptoss_ft.model.spec import Layout, TensorSpec
from gptoss_ft.mxfp4.round import UpdateStats, measure_update, round_merged

# Rows that a worker handles at once: at 2,880 columns its fp32 and fp64 temporaries stay near 30 MB.
CHUNK_ROWS = 128
MAX_WORKERS = 16
# Rows of a tensor without an update that are in memory at once: 47 MB of an embedding.
COPY_ROWS = 8192


@dataclass(frozen=True)
class PackedUpdate:
    """One expert's MXFP4 blocks [O, G, 16], scales [O, G] and bias [O] in the base, and what to add to some rows."""

    blocks: Tensor
    scales: Tensor
    bias: Tensor
    of_rows: Callable[[slice | Tensor], Tensor]

    def target(self, rows: slice | Tensor) -> Tensor:
        """Base + update, fp32."""
        return dequantize_mxfp4(self.blocks[rows], self.scales[rows], torch.float32) + self.of_rows(rows)


class Rounded(NamedTuple):
    """What is written of an expert in place of the base's bytes, and how it compares with the update."""

    blocks: Tensor
    scales: Tensor
    bias: Tensor
    stats: UpdateStats


class Calibrate(Protocol):
    """How to round experts for their inputs, and what to correct for that.

    Attributes:
        few_inputs: experts that it did not round because they have too few inputs, by HF weight name.
        limits: what else it was kept from.
    """

    few_inputs: dict[str, list[int]]
    limits: Limits

    def __call__(self, name: str, expert: int, update: PackedUpdate, pool: ThreadPoolExecutor) -> Rounded | None:
        """An expert of the stack with this HF weight name; None if it is to be rounded to nearest."""

    def corrected(self, name: str) -> Tensor | None:
        """A tensor outside the experts as it is to be written, bf16; None if it is base + update."""

    def written(self, name: str, expert: int, rounded: Rounded) -> None:
        """Told of every expert with an update, however it was rounded, before the next one is asked for."""


class MergedWeights:
    """The tensors of base + updates, for as long as `pool` runs; `updates` grows as they are produced.

    Args:
        calibrate: asked for every expert of a packed base that has an update and for every tensor of attention and
            router, in the order of the layers; without it and where it says None, MXFP4 numbers are rounded to
            nearest, but for `dithered` and `merged_training`.
        dithered: updated experts of a packed base are rounded to MXFP4 by `merge_mxfp4_dithered`.
        merged_training: so they are in the bf16 layout too, as training through the merge saw them.
        q8_0: HF names of the weights that the file will hold in ggml's 8 bits.

    Attributes:
        updates: by HF weight name, over the experts that have an update, how it compares with what was written;
            also every expert stack that had to be rounded from bf16 to MXFP4.
        num_calibrated, num_nearest: weights of experts of packed stacks that were rounded for their inputs and to
            nearest.
        calibrated: `packed_digest` of the former by HF weight name and expert.
        biases: the experts' biases [E, O] that differ from the base's, by HF name.
        corrected: `tensor_digest` by HF name of what was corrected outside the experts, in 8 bits if it is written so.
    """

    def __init__(
        self,
        base: Checkpoint,
        deltas: Mapping[str, LowRankDelta],
        pool: ThreadPoolExecutor,
        calibrate: Calibrate | None = None,
        *,
        dithered: bool = False,
        merged_training: bool = False,
        q8_0: Collection[str] = (),
    ) -> None:
        self.base = base
        self.dithered = dithered or merged_training
        self.q8_0 = q8_0
        self.merged_training = merged_training
        self.deltas = deltas
        self.pool = pool
        self.calibrate = calibrate
        self.num_calibrated = self.num_nearest = 0
        self.calibrated: dict[str, dict[int, str]] = {}
        self.biases: dict[str, Tensor] = {}
        self.corrected: dict[str, str] = {}
        self.packed = base.layout != "bf16"
        self.updates: dict[str, UpdateStats] = {}

    def is_copied(self, name: str) -> bool:
        """Whether the base holds an HF tensor as it is written; known once corrected ones are."""
        weight = name.removesuffix("_blocks").removesuffix("_scales")
        is_corrected = name in self.biases or name in self.corrected
        return weight not in self.deltas and name in self.base.tensor_specs() and not is_corrected

    def entries(self, layout: Layout) -> Iterator[Entry]:
        """Every tensor of a checkpoint in `layout`, ready for `write_shards`."""
        if layout == "original":
            produce = {name: producer for name, _, producer in self.entries("mxfp4")}
            for name, tensor in self.base.spec.tensors("original").items():
                yield name, tensor, partial(_one_after_another, [produce[part] for part in layouts.to_hf(name)])
            return
        for name, tensor in self.base.spec.tensors(layout).items():
            weight = name.removesuffix("_blocks")
            if self.calibrate and (name.endswith("_bias") or ".self_attn." in name or ".router." in name):
                yield name, tensor, partial(self.linear, name)
            elif self.is_copied(name):
                yield name, tensor, partial(self.base.copy, name)
            elif name.endswith("_blocks"):
                # Both come from one rounding; the scales, a 16th of the blocks, wait in memory for their turn.
                scales: deque[Tensor] = deque()
                yield name, tensor, partial(self._blocks, weight, scales)
                yield f"{weight}_scales", TensorSpec(torch.uint8, tensor.shape[:-1]), partial(drain, scales)
            elif not name.endswith("_scales"):
                yield name, tensor, partial(self._bf16_experts if len(tensor.shape) == 3 else self.linear, name)

    def linear(self, name: str) -> Iterator[Tensor]:
        """A tensor outside the expert stacks, bf16: with an update it is one piece, without pieces of some rows.

        The biases of experts are known when these have been asked for.
        """
        if name in self.biases:
            yield self.biases[name]
            return
        delta = self.deltas.get(name)
        corrected = self.calibrate.corrected(name) if self.calibrate else None
        if corrected is not None:
            self.corrected[name] = tensor_digest(through_q8_0(corrected) if name in self.q8_0 else corrected)
            if delta and (factors := delta.factors()):
                self._compare(name, corrected, factors, delta.scaling)
            yield corrected
        elif delta is None:
            num_rows = self.base.tensor_specs()[name].shape[0]
            for start in range(0, num_rows, COPY_ROWS):
                yield self.base.read(name, start, min(start + COPY_ROWS, num_rows))
        else:
            weight = self.base.read(name)
            factors = delta.factors()
            yield weight if factors is None else self._add_as_bf16(name, weight, factors, delta.scaling)

    def packed_experts(self, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """MXFP4 blocks [O, G, 16] and scales [O, G] of each expert of a stack, the base's where it has no update."""
        delta = self.deltas.get(name)
        for expert in range(self.base.spec.num_local_experts):
            factors = delta.factors(expert) if delta else None
            update = None if delta is None or factors is None else partial(_rows_of_update, factors, delta.scaling)
            if self.packed:
                blocks, scales = self._packed_expert(name, expert)
                if delta and factors:
                    blocks, scales = self._add_to_packed(name, expert, blocks, scales, factors, delta.scaling)
            else:
                blocks, scales = self._round_to_mxfp4(name, self._expert_as_bf16(name, expert), update)
            yield blocks, scales

    def _blocks(self, name: str, scales_E: deque[Tensor]) -> Iterator[Tensor]:
        for blocks, scales in self.packed_experts(name):
            scales_E.append(scales)
            yield blocks

    def _bf16_experts(self, name: str) -> Iterator[Tensor]:
        delta = self.deltas.get(name)
        if self.merged_training:
            yield from (dequantize_mxfp4(*packed, torch.bfloat16).T for packed in self.packed_experts(name))
            return
        for expert in range(self.base.spec.num_local_experts):
            weight = self._expert_as_bf16(name, expert)
            factors = delta.factors(expert) if delta else None
            if delta and factors:
                weight = self._add_as_bf16(name, weight, factors, delta.scaling)
            yield weight.T

    def _expert_as_bf16(self, name: str, expert: int) -> Tensor:
        """One expert's weight [O, K]; exact, since bf16 holds every MXFP4 number."""
        if not self.packed:
            return self.base.read(name, expert, expert + 1)[0].T
        return dequantize_mxfp4(*self._packed_expert(name, expert), torch.bfloat16)

    def _packed_expert(self, name: str, expert: int) -> tuple[Tensor, Tensor]:
        blocks = self.base.read(f"{name}_blocks", expert, expert + 1)[0]
        return blocks, self.base.read(f"{name}_scales", expert, expert + 1)[0]

    def _add_as_bf16(self, name: str, weight: Tensor, factors: tuple[Tensor, Tensor], scaling: float) -> Tensor:
        merged = torch.empty(weight.shape, dtype=torch.bfloat16)

        def add(rows: slice) -> UpdateStats:
            base = weight[rows].float()
            target = base + _rows_of_update(factors, scaling, rows)
            merged[rows] = merge_bf16(weight[rows], factors[1], factors[0][rows], scaling)
            return measure_update(base, target, merged[rows].float())

        self._over_rows(name, weight.shape[0], add)
        return merged

    def _compare(self, name: str, written: Tensor, factors: tuple[Tensor, Tensor], scaling: float) -> None:
        """Note what a weight outside the experts keeps of its update."""
        weight = self.base.read(name)

        def measure(rows: slice) -> UpdateStats:
            base = weight[rows].float()
            return measure_update(base, base + _rows_of_update(factors, scaling, rows), written[rows].float())

        self._over_rows(name, len(weight), measure)

    def _add_to_packed(
        self,
        name: str,
        expert: int,
        blocks: Tensor,
        scales: Tensor,
        factors: tuple[Tensor, Tensor],
        scaling: float,
    ) -> tuple[Tensor, Tensor]:
        bias = self.base.read(f"{name}_bias", expert, expert + 1)[0]
        update = PackedUpdate(blocks, scales, bias, partial(_rows_of_update, factors, scaling))
        rounded = self.calibrate(name, expert, update, self.pool) if self.calibrate else None
        if rounded:
            self.num_calibrated += 1
            self.calibrated.setdefault(name, {})[expert] = packed_digest(rounded.blocks, rounded.scales)
            self._note_bias(f"{name}_bias", expert, rounded.bias)
        else:
            self.num_nearest += not self.dithered
            rounded = self._round_elements(update, factors, scaling)
        self._note(name, [rounded.stats])
        if self.calibrate:
            self.calibrate.written(name, expert, rounded)
        return rounded.blocks, rounded.scales

    def _round_elements(self, update: PackedUpdate, factors: tuple[Tensor, Tensor], scaling: float) -> Rounded:
        blocks, scales = update.blocks.clone(), update.scales.clone()
        merge_packed = merge_mxfp4_dithered if self.dithered else merge_mxfp4

        def add(rows: slice) -> UpdateStats:
            base, target = dequantize_mxfp4(blocks[rows], scales[rows], torch.float32), update.target(rows)
            packed = MXFP4Weight(blocks[None, rows], scales[None, rows])
            (blocks[rows],), (scales[rows],) = merge_packed(packed, factors[1][None], factors[0][None, rows], scaling)
            return measure_update(base, target, dequantize_mxfp4(blocks[rows], scales[rows], torch.float32))

        stats = sum(self.pool.map(add, row_chunks(len(blocks))), UpdateStats())
        return Rounded(blocks, scales, update.bias, stats)

    def _note_bias(self, name: str, expert: int, bias: Tensor) -> None:
        if name not in self.biases:
            base = self.base.read(name)
            if torch.equal(bias, base[expert]):
                return
            self.biases[name] = base
        self.biases[name][expert] = bias

    def _round_to_mxfp4(
        self, name: str, weight: Tensor, update: Callable[[slice | Tensor], Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        num_rows, groups = weight.shape[0], weight.shape[1] // BLOCK_SIZE
        blocks = torch.empty(num_rows, groups, BLOCK_SIZE // 2, dtype=torch.uint8)
        scales = torch.empty(num_rows, groups, dtype=torch.uint8)

        def quantize(rows: slice) -> UpdateStats:
            base = target = weight[rows].float()
            blocks[rows], scales[rows] = quantize_mxfp4(base)
            if update:
                target = base + update(rows)
                blocks[rows], scales[rows], _ = round_merged(target, blocks[rows], scales[rows])
            return measure_update(base, target, dequantize_mxfp4(blocks[rows], scales[rows], torch.float32))

        self._over_rows(name, num_rows, quantize)
        return blocks, scales

    def _over_rows(self, name: str, num_rows: int, work: Callable[[slice], UpdateStats]) -> None:
        self._note(name, self.pool.map(work, row_chunks(num_rows)))

    def _note(self, name: str, parts: Iterable[UpdateStats]) -> None:
        self.updates[name] = sum(parts, self.updates.get(name, UpdateStats()))


def row_chunks(num_rows: int) -> list[slice]:
    """What workers take one after another."""
    return [slice(start, start + CHUNK_ROWS) for start in range(0, num_rows, CHUNK_ROWS)]


def packed_digest(blocks: Tensor, scales: Tensor) -> str:
    """A sha256 of MXFP4 numbers, in a checkpoint's order of bytes."""
    digest = sha256(blocks.contiguous().numpy().data)
    digest.update(scales.contiguous().numpy().data)
    return digest.hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """A sha256 of a tensor's bytes."""
    return sha256(tensor.contiguous().view(torch.uint8).numpy().data).hexdigest()


def drain(waiting: deque[Tensor]) -> Iterator[Tensor]:
    """What waits, each forgotten here once it is taken: a list of producers would keep all layers' otherwise."""
    while waiting:
        yield waiting.popleft()


@contextmanager
def row_workers() -> Iterator[ThreadPoolExecutor]:
    """Threads that each run whole chunks on one core.

    Torch's own threads meet after every operation, which on a machine with other work to do made merging 20 times
    slower than one thread.
    """
    num_workers = min(torch.get_num_threads(), MAX_WORKERS)
    with torch_threads(1), ThreadPoolExecutor(num_workers) as pool:
        yield pool


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """Torch runs each operation on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _rows_of_update(factors: tuple[Tensor, Tensor], scaling: float, rows: slice | Tensor) -> Tensor:
    up, down = factors
    return (up[rows].float() @ down.float()).mul_(scaling)


def _one_after_another(producers: list[Producer]) -> Iterator[Tensor | bytes]:
    for produce in producers:
        yield from produce()
