"""Compare the weights in an export with what was trained, block by block, from file to file.

Logits only show the weights that their tokens pass through, and in the mean over positions a damaged row drowns in
the rounding. Here every number counts. O out rows · K in columns · E experts
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from gptoss_ft.export.deltas import LowRankDelta
from gptoss_ft.export.gguf_layout import through_q8_0
from gptoss_ft.export.gguf_read import GgufModel
from gptoss_ft.export.merged import packed_digest, tensor_digest
from gptoss_ft.kernels.dispatch import dequantize_mxfp4, merge_bf16, merge_mxfp4_dithered
from gptoss_ft.kernels.reference import BLOCK_SIZE, MXFP4Weight
from gptoss_ft.model.checkpoint import Checkpoint

CHUNK_ROWS = 4096

Kind = Literal["copied", "update", "bf16", "q8_0", "mxfp4", "dithered", "merged", "calibrated", "corrected"]


@dataclass(frozen=True)
class WeightDistance:
    """The worst block of 32 inputs of a weight, or of an expert of a stack: |exported - trained| / |trained|.

    Attributes:
        name: HF name of the bf16 layout.
        kind: what it is to be: unchanged, an adapter's update, rounded to a format, the very numbers that dithering
            makes of it, or that training through the merge computed with.
        altered: whether its bytes are others than were noted when it was written, where they were.
    """

    name: str
    kind: Kind
    worst: float
    expert: int | None = None
    altered: bool = False

    @property
    def place(self) -> str:
        return self.name if self.expert is None else f"{self.name}, expert {self.expert}"


def checkpoint_distances(
    base: Checkpoint,
    deltas: Mapping[str, LowRankDelta],
    export: Checkpoint | GgufModel,
    calibrated: Mapping[str, Mapping[int, str]] | None = None,
    *,
    dithered: bool = False,
    merged_training: bool = False,
    corrected: Mapping[str, str] | None = None,
) -> Iterator[WeightDistance]:
    """How far every tensor of a merged model is from base + deltas, experts one by one.

    Args:
        dithered: experts were rounded by `merge_mxfp4_dithered`, from a packed base.
        merged_training: base + deltas is what training through the merge computed with, rounded as it was there.
        calibrated: `packed_digest` by name and expert of those that were rounded for their inputs, where a block may be
            far from its target on purpose.
        corrected: `tensor_digest` by name of other tensors that were changed for the sake of outputs.
    """
    rounded = export.rounded if isinstance(export, GgufModel) else set()
    for name, tensor in base.spec.tensors("bf16").items():
        delta = deltas.get(name)
        if len(tensor.shape) == 3:
            for expert in range(tensor.shape[0]):
                found_OK = expert_weight(export, name, expert)
                if (dithered or merged_training) and delta and (factors := delta.factors(expert)):
                    target_OK = _dithered_expert(base, name, expert, factors, delta.scaling)
                    kind: Kind = "merged" if merged_training else "dithered"
                    yield WeightDistance(name, kind, worst_block(target_OK, found_OK), expert)
                    continue
                target_OK = expert_weight(base, name, expert)
                changed = _add(target_OK, delta, expert)
                worst = worst_block(target_OK, found_OK)
                wanted_digest = (calibrated or {}).get(name, {}).get(expert)
                if wanted_digest is None:
                    yield WeightDistance(name, _kind(base, export, changed), worst, expert)
                else:
                    packed = (export.read(f"{name}_{part}", expert, expert + 1)[0] for part in ("blocks", "scales"))
                    yield WeightDistance(name, "calibrated", worst, expert, packed_digest(*packed) != wanted_digest)
        elif wanted_digest := (corrected or {}).get(name):
            found = export.read(name)
            worst = worst_block(base.read(name), found)
            if name not in rounded:
                # GGUF gives them in fp32, where damage may be too small for bf16 to show.
                is_bf16 = torch.equal(found.float(), found.bfloat16().float())
                found = found.bfloat16() if is_bf16 else found
            yield WeightDistance(name, "corrected", worst, altered=tensor_digest(found) != wanted_digest)
        elif merged_training and name not in rounded and delta and (factors := delta.factors()):
            target_OK = merge_bf16(base.read(name), factors[1], factors[0], delta.scaling)
            yield WeightDistance(name, "merged", worst_block(target_OK, export.read(name)))
        elif delta is not None and delta.factors():
            target_OK = base.read(name).float()
            _add(target_OK, delta)
            kind = "q8_0" if name in rounded else "bf16"
            yield WeightDistance(name, kind, worst_block(target_OK, export.read(name)))
        else:
            num_rows = tensor.shape[0]
            chunks = [(start, min(start + CHUNK_ROWS, num_rows)) for start in range(0, num_rows, CHUNK_ROWS)]
            # What ggml makes of the base's numbers is known to the bit.
            wanted = through_q8_0 if name in rounded else Tensor.float
            worst = max(
                worst_block(wanted(base.read(name, *rows)), export.read(name, *rows).float()) for rows in chunks
            )
            yield WeightDistance(name, "copied", worst)


def delta_distances(
    trained: Mapping[str, LowRankDelta], exported: Mapping[str, LowRankDelta]
) -> Iterator[WeightDistance]:
    """How far the updates of two adapters are apart, whatever their factors; a missing one counts as zero."""
    for name in sorted(trained.keys() | exported.keys()):
        present = trained.get(name) or exported[name]
        for expert in range(len(present.A)) if present.A.dim() == 3 else [None]:
            wanted_OK, found_OK = (_product(deltas.get(name), expert, like=present) for deltas in (trained, exported))
            yield WeightDistance(name, "update", worst_block(wanted_OK, found_OK), expert)


def worst_block(wanted: Tensor, found: Tensor) -> float:
    """The largest |found - wanted| / |wanted| of a block of 32 columns; infinite if only `wanted` is 0, or for NaN."""
    if torch.equal(wanted, found):
        return 0.0
    error, size = (_block_norms(values) for values in (found.float() - wanted.float(), wanted.float()))
    ratio = torch.where(error == 0, 0.0, error / size)
    return float(ratio.nan_to_num(nan=torch.inf, posinf=torch.inf).max())


def _block_norms(values: Tensor) -> Tensor:
    # 32 is the block of MXFP4; a remainder, or a whole vector, fills up with zeros.
    return pad(values, (0, -values.shape[-1] % BLOCK_SIZE)).unflatten(-1, (-1, BLOCK_SIZE)).norm(dim=-1)


def expert_weight(checkpoint: Checkpoint | GgufModel, name: str, expert: int) -> Tensor:
    """An expert's weight, fp32 [O, K]."""

    def read(part: str) -> Tensor:
        return checkpoint.read(part, expert, expert + 1)[0]

    if checkpoint.layout == "bf16":
        return read(name).T.float()
    return dequantize_mxfp4(read(f"{name}_blocks"), read(f"{name}_scales"), torch.float32)


def _dithered_expert(
    base: Checkpoint, name: str, expert: int, factors: tuple[Tensor, Tensor], scaling: float
) -> Tensor:
    """An expert's weight as `merge_mxfp4_dithered` rounds it, fp32 [O, K]."""
    packed = MXFP4Weight(*(base.read(f"{name}_{part}", expert, expert + 1) for part in ("blocks", "scales")))
    merged = merge_mxfp4_dithered(packed, factors[1][None], factors[0][None], scaling)
    return dequantize_mxfp4(*merged, torch.float32)[0]


def _add(weight_OK: Tensor, delta: LowRankDelta | None, expert: int | None = None) -> bool:
    """Add the update in place; False if there is none."""
    factors = delta.factors(expert) if delta else None
    if delta is None or factors is None:
        return False
    up, down = factors
    weight_OK += delta.scaling * (up.float() @ down.float())
    return True


def _kind(base: Checkpoint, export: Checkpoint | GgufModel, changed: bool) -> Kind:
    if export.layout == "bf16":
        return "bf16" if changed else "copied"
    return "mxfp4" if changed or base.layout == "bf16" else "copied"


def _product(delta: LowRankDelta | None, expert: int | None, *, like: LowRankDelta) -> Tensor:
    product_OK = torch.zeros(like.B.shape[-2], like.A.shape[-1])
    _add(product_OK, delta, expert)
    return product_OK
