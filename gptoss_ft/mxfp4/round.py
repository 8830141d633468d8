"""Round an updated weight to MXFP4, and measure what that keeps of the update.

Shape suffixes: O rows · K columns (32·G) · G blocks of a row
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gptoss_ft.kernels.dispatch import dequantize_mxfp4
from gptoss_ft.kernels.merging import round_near


@dataclass(frozen=True)
class UpdateStats:
    """How a rounded update compares with the wanted one, as sums that add up over the parts of a tensor.

    With base W, wanted update D and written weight W': squared norms of W, D and of the error W' - W - D, the
    product <W' - W, D>, the number of elements, and of those whose value changed. Of a calibrated rounding also the
    squared norms, for inputs that were not fitted, of what is wrong with the outputs of what the base holds and of what
    was written.
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
        """What is wrong with outputs, relative to the base's: 1 where nothing is gained; None where none were seen."""
        return (self.output_error_sq / self.output_sq) ** 0.5 if self.output_sq else None

    @property
    def retained(self) -> float | None:
        """<W' - W, D> / ||D||²: the share of the update that survives along its own direction; None without one."""
        return self.applied_dot_update / self.update_sq if self.update_sq else None


def measure_update(base: Tensor, target: Tensor, written: Tensor) -> UpdateStats:
    """Compare `written` with `base` and `target` = base + update, all of one shape and in fp32."""
    # fp64 would take most of a merge's time, to say what is read with four digits.
    update, applied, error = ((a - b).flatten() for a, b in ((target, base), (written, base), (written, target)))
    base = base.flatten()
    return UpdateStats(
        base_sq=torch.dot(base, base).item(),
        update_sq=torch.dot(update, update).item(),
        error_sq=torch.dot(error, error).item(),
        applied_dot_update=torch.dot(applied, update).item(),
        num_elements=base.numel(),
        num_changed=int(torch.count_nonzero(applied)),
    )


def round_merged(target: Tensor, base_blocks: Tensor, base_scales: Tensor) -> tuple[Tensor, Tensor, UpdateStats]:
    """`round_near`, and how its result compares with target - base.

    Args:
        target: [O, K], fp32.
        base_blocks: [O, G, 16].
        base_scales: [O, G].
    """
    blocks, scales = round_near(target, base_blocks, base_scales)
    base, written = (
        dequantize_mxfp4(*packed, torch.float32) for packed in ((base_blocks, base_scales), (blocks, scales))
    )
    return blocks, scales, measure_update(base, target, written)
