"""Add low-rank updates to a checkpoint and write it, expert by expert, as bf16 or MXFP4.

Shapes: E experts · O out rows · K in columns · r rank. Weights and updates are oriented [O, K] here; the bf16
layout stores experts transposed.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from gptoss_ft.errors import UserError
from gptoss_ft.files import whole_folder
from gptoss_ft.kernels.dispatch import dequantize_mxfp4
from gptoss_ft.kernels.reference import BLOCK_SIZE
from gptoss_ft.model.checkpoint import Checkpoint
from gptoss_ft.model.shards import Entry, write_shards
from gptoss_ft.model.spec import QUANTIZATION_CONFIG, SPECS, GptOssSpec, TensorSpec, config_as_text
from gptoss_ft.model.tokenizer import TOKENIZER_FILES, write_tokenizer_files
from gptoss_ft.mxfp4.codec import quantize_mxfp4
from gptoss_ft.mxfp4.round import UpdateStats, measure_update, round_merged

MergeFormat = Literal["bf16", "mxfp4"]

# Rows that a worker handles at once: at 2,880 columns its fp32 and fp64 temporaries stay near 30 MB.
CHUNK_ROWS = 128
MAX_WORKERS = 16

# A relative error near 1 means that what was written is as far from the updated weight as the base is.
LOST = 0.95


@dataclass(frozen=True)
class LowRankDelta:
    """The update scaling · B A of a weight [O, K], or one for each expert of a stack.

    Attributes:
        A: [r, K] or [E, r, K].
        B: [O, r] or [E, O, r].
    """

    A: Tensor
    B: Tensor
    scaling: float

    def factors(self, expert: int | None = None) -> tuple[Tensor, Tensor] | None:
        """B [O, r] and A [r, K] of a weight, or of one expert of a stack; None where their product is zero."""
        up, down = (self.B, self.A) if expert is None else (self.B[expert], self.A[expert])
        if self.scaling == 0 or not up.any() or not down.any():
            return None
        return up, down


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        updates: by HF weight name, over the experts that have an update, how it compares with what was written;
            also every expert stack that had to be rounded from bf16 to MXFP4.
        num_copied: tensors whose bytes are the base's.
    """

    format: MergeFormat
    updates: dict[str, UpdateStats]
    num_copied: int

    def __str__(self) -> str:
        total = sum(self.updates.values(), UpdateStats())
        lines = [f"{self.format}: {len(self.updates)} weights written anew, {self.num_copied} tensors copied"]
        if total.update_sq:
            lines.append(
                f"updates of {total.relative_update:.2%} of the weights' norm: {total.retained:.1%} retained, "
                f"error {total.relative_error:.1%} of the update"
            )
        lost = [name for name, stats in self.updates.items() if (stats.relative_error or 0) > LOST]
        if lost:
            lines.append(
                f"{len(lost)} of {len(self.updates)} updates are too small for {self.format} and lost in rounding, "
                f"first {lost[0]}: serve the adapter instead"
            )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "format": self.format,
            "num_tensors_copied": self.num_copied,
            "overall": _as_dict(sum(self.updates.values(), UpdateStats())),
            "tensors": {name: _as_dict(stats) for name, stats in self.updates.items()},
        }


def merge(
    base: Checkpoint,
    deltas: Mapping[str, LowRankDelta],
    out: Path,
    *,
    format: MergeFormat,
    progress: bool = True,
) -> MergeReport:
    """Write base + deltas to the new folder `out`, in HF names.

    Whatever has no update keeps its bytes where the format allows. bf16 weights are rounded to nearest; MXFP4
    experts as `round_merged` describes. config.json is the base's, with `quantization_config` as the format needs.

    Args:
        deltas: by HF weight name: `….self_attn.q_proj.weight`, `….mlp.router.weight`, `….mlp.experts.gate_up_proj`.

    Raises:
        UserError: if a delta is for no weight of the base, of another shape or not finite; if `out` exists or its
            disk is too small. Nothing is left behind.
    """
    check_deltas(base.spec, deltas)
    with whole_folder(out, num_bytes=base.spec.num_bytes(format)) as folder, _row_workers() as pool:
        job = _Job(base, deltas, format, pool)
        _write_companions(base, folder, format)
        write_shards(folder, job.entries(), progress=progress)
    return MergeReport(format, job.updates, job.num_copied)


def check_deltas(spec: GptOssSpec, deltas: Mapping[str, LowRankDelta]) -> None:
    """Raise UserError, naming the weight, unless every delta fits a weight of `spec` and is finite."""
    shapes = weight_shapes(spec)
    for name, delta in deltas.items():
        if name not in shapes:
            raise UserError(f"there is an update for {name}, which is no adaptable weight of this gpt-oss checkpoint")
        *experts, rows, columns = shapes[name]
        rank = delta.A.shape[-2] if delta.A.dim() > 1 else 0
        if (*delta.A.shape,) != (*experts, rank, columns) or (*delta.B.shape,) != (*experts, rows, rank):
            raise UserError(
                f"the update of {name} has A {list(delta.A.shape)} and B {list(delta.B.shape)}, which do not fit a "
                f"weight of shape {list(shapes[name])}: it was trained on another base"
            )
        if not (delta.A.isfinite().all() and delta.B.isfinite().all() and abs(delta.scaling) < float("inf")):
            raise UserError(f"the update of {name} holds NaN or infinite values: the training run diverged")


def weight_shapes(spec: GptOssSpec) -> dict[str, tuple[int, ...]]:
    """Every weight that can have an update, by HF name: [O, K], or [E, O, K] for expert stacks."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(spec.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        for name, shape in spec.linear_shapes().items():
            shapes[f"{prefix}.{name}.weight"] = shape
        for name, shape in spec.expert_shapes().items():
            shapes[f"{prefix}.mlp.experts.{name}"] = (spec.num_local_experts, *shape)
    return shapes


class _Job:
    """The producers of one merge, and the statistics they gather while the file is written."""

    def __init__(
        self, base: Checkpoint, deltas: Mapping[str, LowRankDelta], format: MergeFormat, pool: ThreadPoolExecutor
    ) -> None:
        self.base = base
        self.deltas = deltas
        self.format = format
        self.pool = pool
        self.packed = base.layout != "bf16"
        self.updates: dict[str, UpdateStats] = {}
        self.num_copied = 0

    def entries(self) -> Iterator[Entry]:
        copyable = self.base.tensor_specs()
        for name, tensor in self.base.spec.tensors(self.format).items():
            weight = name.removesuffix("_blocks").removesuffix("_scales")
            delta = self.deltas.get(weight)
            if delta is None and name in copyable:
                self.num_copied += 1
                yield name, tensor, partial(self.base.copy, name)
            elif weight == name and len(tensor.shape) == 3:
                yield name, tensor, partial(self._bf16_experts, name, delta)
            elif weight == name and delta is not None:
                yield name, tensor, partial(self._linear, name, delta)
            elif name.endswith("_blocks"):
                # Both come from one rounding; the scales, a 16th of the blocks, wait in memory for their turn.
                scales: list[Tensor] = []
                yield name, tensor, partial(self._mxfp4_blocks, weight, delta, scales)
                yield f"{weight}_scales", TensorSpec(torch.uint8, tensor.shape[:-1]), partial(iter, scales)

    def _linear(self, name: str, delta: LowRankDelta) -> Iterator[Tensor]:
        weight = self.base.read(name)
        factors = delta.factors()
        yield weight if factors is None else self._add_as_bf16(name, weight, factors, delta.scaling)

    def _bf16_experts(self, name: str, delta: LowRankDelta | None) -> Iterator[Tensor]:
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

    def _mxfp4_blocks(self, name: str, delta: LowRankDelta | None, scales_E: list[Tensor]) -> Iterator[Tensor]:
        for expert in range(self.base.spec.num_local_experts):
            factors = delta.factors(expert) if delta else None
            update = None if delta is None or factors is None else partial(_rows_of_update, factors, delta.scaling)
            if self.packed:
                blocks, scales = self._packed_expert(name, expert)
                if update:
                    self._add_to_packed(name, blocks, scales, update)
            else:
                blocks, scales = self._round_to_mxfp4(name, self._expert_as_bf16(name, expert), update)
            scales_E.append(scales)
            yield blocks

    def _add_as_bf16(self, name: str, weight: Tensor, factors: tuple[Tensor, Tensor], scaling: float) -> Tensor:
        merged = torch.empty(weight.shape, dtype=torch.bfloat16)

        def add(rows: slice) -> UpdateStats:
            base = weight[rows].float()
            target = base + _rows_of_update(factors, scaling, rows)
            merged[rows] = target.bfloat16()
            return measure_update(base, target, merged[rows].float())

        self._over_rows(name, weight.shape[0], add)
        return merged

    def _add_to_packed(self, name: str, blocks: Tensor, scales: Tensor, update: Callable[[slice], Tensor]) -> None:
        def add(rows: slice) -> UpdateStats:
            target = dequantize_mxfp4(blocks[rows], scales[rows], torch.float32) + update(rows)
            blocks[rows], scales[rows], stats = round_merged(target, blocks[rows], scales[rows])
            return stats

        self._over_rows(name, blocks.shape[0], add)

    def _round_to_mxfp4(
        self, name: str, weight: Tensor, update: Callable[[slice], Tensor] | None
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
        chunks = [slice(start, start + CHUNK_ROWS) for start in range(0, num_rows, CHUNK_ROWS)]
        self.updates[name] = sum(self.pool.map(work, chunks), self.updates.get(name, UpdateStats()))


@contextmanager
def _row_workers() -> Iterator[ThreadPoolExecutor]:
    """Threads that each run whole chunks on one core.

    Torch's own threads meet after every operation, which on a machine with other work to do made merging 20 times
    slower than one thread.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(min(num_threads, MAX_WORKERS)) as pool:
            yield pool
    finally:
        torch.set_num_threads(num_threads)


def _rows_of_update(factors: tuple[Tensor, Tensor], scaling: float, rows: slice) -> Tensor:
    up, down = factors
    return (up[rows].float() @ down.float()).mul_(scaling)


def _write_companions(base: Checkpoint, folder: Path, format: MergeFormat) -> None:
    (folder / "config.json").write_bytes(_config(base, format))
    present = [name for name in TOKENIZER_FILES if (base.path / name).is_file()]
    if "tokenizer.json" not in present and base.spec.vocab_size == SPECS["gpt_oss_20b"].vocab_size:
        write_tokenizer_files(folder)
    for name in present:
        shutil.copyfile(base.path / name, folder / name)


def _config(base: Checkpoint, format: MergeFormat) -> bytes:
    if base.layout == format:
        return (base.path / "config.json").read_bytes()
    if base.layout == "original":
        return base.spec.config_text(format).encode()
    config = {key: value for key, value in base.config.items() if key != "quantization_config"}
    if format == "mxfp4":
        config["quantization_config"] = QUANTIZATION_CONFIG
    return config_as_text(config).encode()


def _as_dict(stats: UpdateStats) -> dict[str, Any]:
    return {
        "relative_update": stats.relative_update,
        "changed_share": stats.changed_share,
        "retained": stats.retained,
        "relative_error": stats.relative_error,
        "rounding_error": stats.rounding_error,
        "num_elements": stats.num_elements,
    }
