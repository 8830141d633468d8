"""Round an updated weight to MXFP4 without disturbing what the update leaves alone.

Shape suffixes: O rows · K columns (32·G) · G blocks of a row · V elements of a block (32).

The common scale rules step exactly where numbers of the grid lie, so a nudge of a block's largest element can
double its step and cost far more than the update. The base's scales are therefore kept, and a block takes the
"even" scale only where that lowers its own squared error.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gptoss_ft.kernels.reference import BLOCK_SIZE, dequantize_mxfp4
from gptoss_ft.mxfp4.codec import SIGN_BIT, even_scales, pack_nibbles, quantize_mxfp4, unpack_nibbles


@dataclass(frozen=True)
class UpdateStats:
    """How a rounded update compares with the wanted one, as sums that add up over the parts of a tensor.

    With base W, wanted update D and written weight W': squared norms of W, D and of the error W' - W - D, the
    product <W' - W, D>, the number of elements, and of those whose value changed. Of a calibrated rounding also the
    squared norms of D x and (W' - W - D) x over held-out inputs x.
    """

    base_sq: float = 0.0
    update_sq: float = 0.0
    error_sq: float = 0.0
    applied_dot_update: float = 0.0
    num_elements: int = 0
    num_changed: int = 0
    output_sq: float = 0.0
    output_error_sq: float = 0.0

    def __add__(self, other: "UpdateStats") -> "UpdateStats":
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return UpdateStats(*(mine + theirs for mine, theirs in pairs))

    @property
    def relative_update(self) -> float:
        """||D|| / ||W||."""
        return (self.update_sq / self.base_sq) ** 0.5 if self.base_sq else 0.0

    @property
    def rounding_error(self) -> float:
        """||W' - W - D|| / ||W||."""
        return (self.error_sq / self.base_sq) ** 0.5 if self.base_sq else 0.0

    @property
    def changed_share(self) -> float:
        return self.num_changed / self.num_elements if self.num_elements else 0.0

    @property
    def relative_error(self) -> float | None:
        """||W' - W - D|| / ||D||: 1 where the update is lost, more where writing it did harm; None without one."""
        return (self.error_sq / self.update_sq) ** 0.5 if self.update_sq else None

    @property
    def output_error(self) -> float | None:
        """||(W' - W - D) x|| / ||D x|| over held-out inputs: 1 where the update is lost; None where none were given."""
        return (self.output_error_sq / self.output_sq) ** 0.5 if self.output_sq else None

    @property
    def retained(self) -> float | None:
        """<W' - W, D> / ||D||²: the share of the update that survives along its own direction; None without one."""
        return self.applied_dot_update / self.update_sq if self.update_sq else None


def measure_update(base: Tensor, target: Tensor, written: Tensor) -> UpdateStats:
    """Compare `written` with `base` and `target` = base + update, all of one shape and summed in fp64."""
    base64, update = base.double(), target.double() - base.double()
    applied = written.double() - base64
    return UpdateStats(
        base_sq=base64.square().sum().item(),
        update_sq=update.square().sum().item(),
        error_sq=(applied - update).square().sum().item(),
        applied_dot_update=(applied * update).sum().item(),
        num_elements=base.numel(),
        num_changed=int(torch.count_nonzero(applied)),
    )


def round_merged(target: Tensor, base_blocks: Tensor, base_scales: Tensor) -> tuple[Tensor, Tensor, UpdateStats]:
    """Round `target` [O, K], fp32, to the nearest MXFP4 numbers near a base of blocks [O, G, 16] and scales [O, G].

    An element whose value stays keeps its base code, so that a block that does not change keeps its bytes, zeros
    of either sign included.

    Returns:
        Blocks, scales, and how the result compares with target - base.
    """
    base = dequantize_mxfp4(base_blocks, base_scales, torch.float32)
    blocks, _ = quantize_mxfp4(target, base_scales)
    blocks, scales = _keep_base_zeros(blocks, base_blocks), base_scales.clone()
    written = dequantize_mxfp4(blocks, scales, torch.float32)
    # Only blocks whose scale would differ are worth a second rounding: few, or none, of a base that "even" rounded.
    even = even_scales(target)
    candidates = even != base_scales
    wanted_NV = _in_blocks(target)[candidates]
    even_blocks, even_scale = quantize_mxfp4(wanted_NV, even[candidates].unsqueeze(-1))
    even_values = dequantize_mxfp4(even_blocks, even_scale, torch.float32)
    better = _squared_error(even_values, wanted_NV) < _squared_error(_in_blocks(written)[candidates], wanted_NV)
    rescaled = candidates.masked_scatter(candidates, better)
    blocks[rescaled] = even_blocks[better].squeeze(-2)
    scales[rescaled] = even[rescaled]
    _in_blocks(written)[rescaled] = even_values[better]
    return blocks, scales, measure_update(base, target, written)


def _in_blocks(values: Tensor) -> Tensor:
    return values.unflatten(-1, (-1, BLOCK_SIZE))


def _squared_error(values: Tensor, wanted: Tensor) -> Tensor:
    return (values - wanted).double().square().sum(-1)


def _keep_base_zeros(blocks: Tensor, base_blocks: Tensor) -> Tensor:
    """Where a zero stays zero, keep the sign its base code has."""
    codes, base_codes = unpack_nibbles(blocks), unpack_nibbles(base_blocks)
    both_zero = ((codes | base_codes) & (SIGN_BIT - 1)) == 0
    return pack_nibbles(torch.where(both_zero, base_codes, codes))
