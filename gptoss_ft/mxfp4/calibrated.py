"""Round an updated weight to MXFP4 so that its outputs, not its elements, stay as near as they can.

Shape suffixes: O rows · K columns (32·G) · G blocks of a row · N inputs of the weight

An update of one per cent is smaller than half a step of the grid, so rounding each element to its nearest number
returns the base. What saves it is that inputs are correlated: errors of one column can be made up for by others, see
`sweeps`. On inputs that were not fitted a row has to do better with it than with the base's bytes; one that does not is
rounded to nearest where that wins, and else keeps those bytes.
"""

from dataclasses import replace

import torch
from torch import Tensor

from gptoss_ft.kernels.codec import quantize_mxfp4
from gptoss_ft.kernels.dispatch import dequantize_mxfp4
from gptoss_ft.kernels.reference import BLOCK_SIZE, scale_values
from gptoss_ft.mxfp4.round import UpdateStats, measure_update, round_merged
from gptoss_ft.mxfp4.sweeps import Sweeps

# Of the inputs, every so many is held out; of few inputs more, because on 8 of them rows that lose win by luck.
HELD_OUT_EVERY, MIN_HELD_OUT = 8, 32
# Fewer say too little of the inputs to be better than rounding to nearest.
MIN_INPUTS = 2 * MIN_HELD_OUT
# Added to the diagonal of the second moment as a share of its mean. The best was 0.3 for 512 and for 4,096 inputs where
# all features are alike, and 0.01 or less where they differ much in size: 0.3 would have cost a third more error there.
DAMPINGS = (0.3, 0.1, 0.01)
# By the held-out error of so many rows one is chosen.
TRIAL_ROWS = 128
# The mean over all rows counts like so many held-out inputs of a row: single rows win by luck.
PRIOR_INPUTS = 200
TINY = torch.finfo(torch.float32).tiny
# What else decides a result, for those who keep results: raise the number when the methods change.
RULES = ("calibrated rounding 1", HELD_OUT_EVERY, MIN_HELD_OUT, DAMPINGS, TRIAL_ROWS, PRIOR_INPUTS)


class CalibratedRounding:
    """Rounds rows of one weight [O, K] for the inputs it has; works on any device.

    Args:
        inputs_NK: a sample of the weight's inputs, at least `MIN_INPUTS`.
        trial: some of the rows to be rounded, see `trial_rows`: target, blocks and scales of the base, as for `round`.
            The damping that is best for them is taken for all.
    """

    def __init__(self, inputs_NK: Tensor, trial: tuple[Tensor, Tensor, Tensor]) -> None:
        if len(inputs_NK) < MIN_INPUTS:
            raise ValueError(f"{len(inputs_NK)} inputs are too few to calibrate on: at least {MIN_INPUTS}")
        held_out = is_held_out(len(inputs_NK)).to(inputs_NK.device)
        fitted = inputs_NK[~held_out].float()
        self.held_out = inputs_NK[held_out].float()

        target, base_blocks, base_scales = trial
        moment_KK = fitted.T @ fitted / len(fitted)
        nearest_blocks, scales, _ = round_merged(target, base_blocks, base_scales)
        base_cost = self._cost(base_blocks, base_scales, target)
        total = base_cost.sum().clamp_min(TINY)
        # Ratios of all rows together: what to expect of one before its own few inputs are looked at.
        self.nearest_ratio = float(self._cost(nearest_blocks, scales, target).sum() / total)
        lowest = float("inf")
        for damping in DAMPINGS:
            sweeps = Sweeps(moment_KK, damping)
            costs = self._output_sq(sweeps.round(target, _steps(scales)) - target)
            cost = float(torch.minimum(costs, base_cost).sum())
            if cost < lowest:
                lowest, self.sweeps, self.ratio = cost, sweeps, float(costs.sum() / total)

    def round(self, target: Tensor, base_blocks: Tensor, base_scales: Tensor) -> tuple[Tensor, Tensor, UpdateStats]:
        """Round `target` [O, K], fp32, near a base of blocks [O, G, 16] and scales [O, G], a row independent of others.

        Scales are those of `round_merged`: the base's unless "even" ones lower a block's squared error.

        Returns:
            Blocks, scales, and how the result compares with target - base, on held-out inputs too.
        """
        nearest_blocks, scales, _ = round_merged(target, base_blocks, base_scales)
        rounded = self.sweeps.round(target, _steps(scales))
        base_cost = self._cost(base_blocks, base_scales, target)
        nearest_wins = self._wins(self._cost(nearest_blocks, scales, target), base_cost, self.nearest_ratio)
        wins = self._wins(self._output_sq(rounded - target), base_cost, self.ratio)
        blocks = torch.where(nearest_wins[:, None, None], nearest_blocks, base_blocks)
        blocks = torch.where(wins[:, None, None], quantize_mxfp4(rounded, scales)[0], blocks)
        scales = torch.where((wins | nearest_wins)[:, None], scales, base_scales)
        written = dequantize_mxfp4(blocks, scales, torch.float32)
        stats = measure_update(dequantize_mxfp4(base_blocks, base_scales, torch.float32), target, written)
        output_error_sq = self._output_sq(written - target).sum().item()
        return blocks, scales, replace(stats, output_sq=base_cost.sum().item(), output_error_sq=output_error_sq)

    def _wins(self, costs: Tensor, base_costs: Tensor, ratio: float) -> Tensor:
        """Which rows cost less than the base, as far as can be told from the held-out inputs and all rows' `ratio`."""
        num_inputs = len(self.held_out)
        expected = (num_inputs * costs + PRIOR_INPUTS * ratio * base_costs) / (num_inputs + PRIOR_INPUTS)
        return expected < (1 - 0.5 * num_inputs**-0.5) * base_costs

    def _cost(self, blocks: Tensor, scales: Tensor, target: Tensor) -> Tensor:
        return self._output_sq(dequantize_mxfp4(blocks, scales, torch.float32) - target)

    def _output_sq(self, difference: Tensor) -> Tensor:
        """Squared norm over the held-out inputs of what each row's difference puts out: [O]."""
        return (difference @ self.held_out.T).square().sum(1)


def is_held_out(num_inputs: int) -> Tensor:
    """Which of so many inputs judge and are not fitted, `[N]`."""
    return torch.arange(num_inputs) % min(HELD_OUT_EVERY, num_inputs // MIN_HELD_OUT) == 0


def trial_rows(num_rows: int) -> Tensor:
    """Indices of rows for the trial of `CalibratedRounding`, spread over a weight of `num_rows`."""
    return torch.linspace(0, num_rows - 1, min(num_rows, TRIAL_ROWS)).round().long()


def _steps(scales: Tensor) -> Tensor:
    """The value of the scale of each element: [O, K]."""
    return scale_values(scales, torch.float32).repeat_interleave(BLOCK_SIZE, dim=1)
