"""Round an updated weight to MXFP4 so that its outputs, not its elements, stay as near as they can.

Shape suffixes: O rows · K columns (32·G) · G blocks of a row · N inputs of the weight

An update of one per cent is smaller than half a step of the grid, so rounding each element to its nearest number
returns the base. What saves it is that inputs are correlated: errors of one column can be made up for by others, see
`sweeps`. How much more a row so rounded costs on inputs that were not fitted, some rows tell in a trial with a part of
the inputs held out. A row that does not come nearer to its outputs by that is rounded to nearest or keeps the base's
bytes, whichever is best.
"""

import torch
from torch import Tensor

from gptoss_ft.kernels.codec import even_scales, quantize_mxfp4
from gptoss_ft.kernels.dispatch import dequantize_mxfp4
from gptoss_ft.kernels.merging import round_near
from gptoss_ft.kernels.reference import BLOCK_SIZE, scale_values
from gptoss_ft.mxfp4.sweeps import LEAST_DAMPING, MAX_PASSES, Sweeps

# An eighth of the inputs is held out, or more of few, a quarter at most.
HELD_OUT_EVERY, MIN_HELD_OUT = (4, 8), 32
# Fewer say too little of the inputs to be better than rounding to nearest. Callers may hold out a quarter of them.
MIN_INPUTS, MIN_FITTED = 64, 48
# The share by which the second moment's diagonal may be raised, see `Sweeps`, and the one that is tried first. More is
# better for fewer inputs: on a tiny trained model 1.0 for 90, 0.3 for 500 and 0.1 for 4,000. The share is each column's
# own: of the mean, 0.3 would have been a third worse where features differ much in size.
DAMPINGS, FIRST_DAMPING = (0.01, 0.03, 0.1, 0.3, 1.0), 0.3
TRIAL_ROWS = 128
# Of the inputs, at most so many say what a row costs that was not fitted to them.
MAX_JUDGES = 256
# The mean over all rows counts like so many inputs of a row: single rows win by luck.
PRIOR_INPUTS = 200
TINY = torch.finfo(torch.float32).tiny
# What else decides a result, for those who keep results: raise the number when the methods change.
RULES = (
    "calibrated rounding 2",
    (HELD_OUT_EVERY, MIN_HELD_OUT, DAMPINGS, FIRST_DAMPING, TRIAL_ROWS, MAX_JUDGES, PRIOR_INPUTS),
    (LEAST_DAMPING, MAX_PASSES),
)


class CalibratedRounding:
    """Rounds rows of one weight [O, K] for the inputs it has, all of which are fitted; works on any device.

    Args:
        inputs_NK: a sample of the weight's inputs, at least `MIN_FITTED`.
        trial: some of the rows to be rounded, see `trial_rows`: target, blocks and scales of the base, as for `round`.
            The damping that is best for them is taken for all.
    """

    def __init__(self, inputs_NK: Tensor, trial: tuple[Tensor, Tensor, Tensor]) -> None:
        num_inputs = len(inputs_NK)
        if num_inputs < MIN_FITTED:
            raise ValueError(f"{num_inputs} inputs are too few to calibrate on: at least {MIN_FITTED}")
        inputs_NK = inputs_NK.float()
        # Columns that weigh most first: the more columns are yet to come, the better an error is made up for.
        self.order = inputs_NK.square().sum(0).argsort(descending=True, stable=True)
        self.places = self.order.argsort()
        self.judges = inputs_NK[:: -(-num_inputs // MAX_JUDGES)]
        in_trial = is_held_out(num_inputs).to(inputs_NK.device)
        self.num_held_out = int(in_trial.sum())
        fitted, held_out = inputs_NK[~in_trial], inputs_NK[in_trial]
        gram_KK = self._gram(fitted)
        damping = self._try(gram_KK / len(fitted), held_out, trial)
        self.sweeps = Sweeps(gram_KK.add_(self._gram(held_out)).div_(num_inputs), damping)

    def _try(self, moment_KK: Tensor, held_out: Tensor, trial: tuple[Tensor, Tensor, Tensor]) -> float:
        """The best damping; notes what to expect of a row before its own costs are looked at, by those of all."""
        target, base_blocks, base_scales = trial
        base_cost = _cost(dequantize_mxfp4(base_blocks, base_scales, torch.float32) - target, held_out)
        total = base_cost.sum().clamp_min(TINY)
        nearest_blocks, scales = round_near(target, base_blocks, base_scales)
        nearest = dequantize_mxfp4(nearest_blocks, scales, torch.float32)
        self.nearest_ratio = float(_cost(nearest - target, held_out).sum() / total)
        finer = _finer(target, scales)

        def attempt(damping: float) -> tuple[float, float]:
            rounded, fitted_cost = self._sweep(Sweeps(moment_KK, damping), target, finer)
            cost = _cost(rounded - target, held_out)
            attempts[damping] = float(cost.sum() / total), float(cost.sum() / fitted_cost.sum().clamp_min(TINY))
            return float(torch.minimum(cost, base_cost).sum()), damping

        attempts: dict[float, tuple[float, float]] = {}
        first = DAMPINGS.index(FIRST_DAMPING)
        best = attempt(FIRST_DAMPING)
        # Down for as long as it gets better, and else up.
        for dampings in (reversed(DAMPINGS[:first]), DAMPINGS[first + 1 :]):
            for damping in dampings:
                found = attempt(damping)
                if found >= best:
                    break
                best = found
            if best[1] < FIRST_DAMPING:
                break
        self.ratio, self.optimism = attempts[best[1]]
        return best[1]

    def round(self, target: Tensor, base_blocks: Tensor, base_scales: Tensor) -> tuple[Tensor, Tensor]:
        """Round `target` [O, K], fp32, near a base of blocks [O, G, 16] and scales [O, G], a row independent of others.

        Returns:
            Blocks, and scales, which are those of `round_near` or finer.
        """
        base = dequantize_mxfp4(base_blocks, base_scales, torch.float32)
        nearest_blocks, nearest_scales = round_near(target, base_blocks, base_scales)
        scales = _finer(target, nearest_scales)
        rounded, fitted_cost = self._sweep(self.sweeps, target, scales)
        nearest = dequantize_mxfp4(nearest_blocks, nearest_scales, torch.float32)
        costs = torch.stack(
            (_cost(base - target, self.judges), _cost(nearest - target, self.judges), self.optimism * fitted_cost)
        )
        best = self._choose(costs, (rounded == base).all(1))
        packed = ((base_blocks, base_scales), (nearest_blocks, nearest_scales), quantize_mxfp4(rounded, scales))
        rows = torch.arange(len(best), device=best.device)
        blocks, scales = (torch.stack(parts)[best, rows] for parts in zip(*packed, strict=True))
        return blocks, scales

    def _choose(self, costs: Tensor, is_base: Tensor) -> Tensor:
        """For each row the number of its least cost: base, nearest, or calibrated unless it `is_base`."""
        # Something else than the base's bytes has to win clearly.
        base = costs[0] * (1 - 0.5 * self.num_held_out**-0.5)
        nearest, calibrated = (
            self._expected(cost, costs[0], ratio)
            for cost, ratio in zip(costs[1:], (self.nearest_ratio, self.ratio), strict=True)
        )
        best = (nearest < base).long()
        return torch.where((calibrated < torch.minimum(base, nearest)) & ~is_base, 2, best)

    def _expected(self, costs: Tensor, base_costs: Tensor, ratio: float) -> Tensor:
        num_inputs = len(self.judges)
        return (num_inputs * costs + PRIOR_INPUTS * ratio * base_costs) / (num_inputs + PRIOR_INPUTS)

    def _gram(self, inputs_NK: Tensor) -> Tensor:
        ordered_NK = inputs_NK[:, self.order]
        return ordered_NK.T @ ordered_NK

    def _sweep(self, sweeps: Sweeps, target: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        """`Sweeps.round` in the order of its columns."""
        steps = scale_values(scales, torch.float32).repeat_interleave(BLOCK_SIZE, dim=1)
        rounded, cost = sweeps.round(target[:, self.order], steps[:, self.order])
        return rounded[:, self.places], cost


def is_held_out(num_inputs: int) -> Tensor:
    """Which of so many inputs judge what is fitted to the others, `[N]`."""
    every = min(max(num_inputs // MIN_HELD_OUT, HELD_OUT_EVERY[0]), HELD_OUT_EVERY[1])
    return torch.arange(num_inputs) % every == 0


def trial_rows(num_rows: int) -> Tensor:
    """Indices of rows for the trial of `CalibratedRounding`, spread over a weight of `num_rows`."""
    return torch.linspace(0, num_rows - 1, min(num_rows, TRIAL_ROWS)).round().long()


def _finer(target: Tensor, scales: Tensor) -> Tensor:
    """Scales one lower where that has room for a block by the "even" rule.

    Others round such blocks of a base as well with either; errors that are to cancel are smaller in smaller steps.
    """
    even = even_scales(target)
    return torch.where(even.int() == scales.int() - 1, even, scales)


def _cost(difference: Tensor, inputs_NK: Tensor) -> Tensor:
    """Mean square over inputs of what each row's difference puts out: [O]."""
    return (difference @ inputs_NK.T).square().mean(1)
