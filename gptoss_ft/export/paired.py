"""Round an expert so that it puts out in the merged model what it puts out in the trained one.

Its inputs x' in the merged model are other than x in the trained one, since the layers before it were rounded too. The
weight Q and the bias b' that are written are to bring Q x' + b' near T x + b + l, T the trained weight and l what was
left elsewhere for this expert to make good:

1. What x' tells of the outputs T (x - x') + l that would be missing, found by ridge regression, is added to T.
2. The mean of what is missing then goes into the bias, so that Q is rounded for inputs without their mean.

Inputs that had no part in it judge both, row by row of the weight. Each input counts as its weight says.

N inputs · M of them that judge · K columns · O out rows
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from gptoss_ft.export.merged import PackedUpdate, Rounded, row_chunks, torch_threads
from gptoss_ft.export.ridge import best_ridge
from gptoss_ft.kernels.dispatch import dequantize_mxfp4
from gptoss_ft.mxfp4.calibrated import CalibratedRounding, is_held_out, trial_rows
from gptoss_ft.mxfp4.round import UpdateStats, measure_update

# See `best_ridge`.
RIDGES = (1.0, 0.1, 0.01)
# What decides a result beside the rounding itself, for those who keep results: raise the number when methods change.
RULES = ("paired rounding 3", RIDGES)


def round_paired(
    trained_NK: Tensor,
    merged_NK: Tensor,
    update: PackedUpdate,
    pool: ThreadPoolExecutor,
    num_threads: int,
    left_NO: Tensor | None = None,
    weights_N: Tensor | None = None,
) -> Rounded:
    """Round one expert for its inputs, which belong together row by row, in the trained and in the merged model.

    Args:
        left_NO: what its outputs are to make good beside, none if None.
        weights_N: how much the squared error of each counts, above 0; all the same if None.
    """
    with torch_threads(num_threads):
        rounding = PairedRounding(trained_NK, merged_NK, update, left_NO, weights_N)
    blocks, scales, bias = (torch.empty_like(part) for part in (update.blocks, update.scales, update.bias))

    def round_rows(rows: slice) -> UpdateStats:
        blocks[rows], scales[rows], bias[rows], stats = rounding.round(rows)
        return stats

    return Rounded(blocks, scales, bias, sum(pool.map(round_rows, row_chunks(len(blocks))), UpdateStats()))


class PairedRounding:
    """Rounds rows of one expert's weight. See `round_paired`."""

    def __init__(
        self,
        trained_NK: Tensor,
        merged_NK: Tensor,
        update: PackedUpdate,
        left_NO: Tensor | None = None,
        weights_N: Tensor | None = None,
    ) -> None:
        self.update = update
        if left_NO is None:
            left_NO = torch.zeros(1, len(update.blocks)).expand(len(merged_NK), -1)
        if weights_N is None:
            weights_N = torch.ones(len(merged_NK))
        held_out, pairs = is_held_out(len(merged_NK)), (trained_NK, merged_NK, left_NO, weights_N[:, None])
        fitted = [part[~held_out].float() for part in pairs]
        shares = fitted[-1] / fitted[-1].sum()
        self.trained_mean, self.merged_mean, self.left_mean = ((shares * part).sum(0) for part in fitted[:-1])
        self.trained_MK, self.merged_MK, self.left_MO, self.weights_M1 = judges = [
            part[held_out].float() for part in pairs
        ]
        target_OK = update.target(slice(None))

        def centred(trained: Tensor, merged: Tensor, left: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
            """Inputs in the merged model and what T would leave missing of their outputs, times root weights."""
            merged = merged - self.merged_mean
            missing = (trained - self.trained_mean - merged) @ target_OK.T + (left - self.left_mean)
            return merged * weights.sqrt(), missing * weights.sqrt()

        inputs, missing_NO = centred(*fitted)
        self.missing_OK = best_ridge((inputs, missing_NO), centred(*judges), RIDGES)
        rows = trial_rows(len(update.blocks))
        trial = self._wanted(update.target(rows), rows), update.blocks[rows], update.scales[rows]
        self.rounding = CalibratedRounding(inputs, trial)

    def round(self, rows: slice) -> Rounded:
        """Of some rows."""
        base_blocks, base_scales, base_bias = (
            part[rows] for part in (self.update.blocks, self.update.scales, self.update.bias)
        )
        target = self.update.target(rows)
        blocks, scales = self.rounding.round(self._wanted(target, rows), base_blocks, base_scales)
        base, written = (
            dequantize_mxfp4(*packed, torch.float32) for packed in ((base_blocks, base_scales), (blocks, scales))
        )
        missing = target @ self.trained_mean + self.left_mean[rows] - written @ self.merged_mean
        corrected = (base_bias.float() + missing).to(base_bias.dtype)
        outputs_MO = self.trained_MK @ target.T + self.left_MO[:, rows]
        wrong_MO = outputs_MO - self.merged_MK @ written.T
        base_cost, uncorrected_cost, corrected_cost = (
            (self.weights_M1 * wrong.square()).sum(0)
            for wrong in (
                outputs_MO - self.merged_MK @ base.T,
                wrong_MO,
                wrong_MO - (corrected.float() - base_bias.float()),
            )
        )
        # Where neither is better than the base's row, it stays.
        is_corrected = corrected_cost < uncorrected_cost
        cost = torch.where(is_corrected, corrected_cost, uncorrected_cost)
        wins = cost < base_cost
        blocks = torch.where(wins[:, None, None], blocks, base_blocks)
        scales = torch.where(wins[:, None], scales, base_scales)
        bias = torch.where(wins & is_corrected, corrected, base_bias)
        stats = measure_update(base, target, torch.where(wins[:, None], written, base))
        output_error_sq = torch.where(wins, cost, base_cost).sum().item()
        return Rounded(
            blocks,
            scales,
            bias,
            replace(stats, output_sq=base_cost.sum().item(), output_error_sq=output_error_sq),
        )

    def _wanted(self, target: Tensor, rows: slice | Tensor) -> Tensor:
        return target if self.missing_OK is None else target + self.missing_OK[rows]
