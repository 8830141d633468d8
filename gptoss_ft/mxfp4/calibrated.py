"""Round an updated weight to MXFP4 so that its outputs, not its elements, stay as near as they can.

Shape suffixes: O rows · K columns (32·G) · G blocks of a row · N inputs of the weight

An update of one per cent is smaller than half a step of the grid, so rounding each element to its nearest number
returns the base. What saves it is that inputs are correlated: with their second moment H = E[x xᵀ], a rounding Q of the
target T costs tr (Q - T) H (Q - T)ᵀ, and errors of one column can be made up for by others. Two known methods follow
each other: GPTQ (Frantar et al., arXiv 2210.17323) fixes column after column and moves its error to the columns to
come; coordinate descent then goes over the columns again while any single change lowers the cost. A row keeps the
base's bytes unless it does better than they do on inputs that neither method has seen.
"""

from dataclasses import replace

import torch
from torch import Tensor

from gptoss_ft.kernels.codec import quantize_mxfp4
from gptoss_ft.kernels.dispatch import dequantize_mxfp4, round_columns
from gptoss_ft.kernels.reference import BLOCK_SIZE, scale_values
from gptoss_ft.mxfp4.round import UpdateStats, measure_update, round_merged

# Added to the diagonal of H as a share of its mean. Of 0.01, 0.03 and 0.1, for 4,096 inputs of 2,880 features, 0.03 was
# best or within one per cent of it for every spectrum tried.
DAMPING = 0.03
# Of the inputs, every so many is held out.
HELD_OUT_EVERY = 8
MAX_PASSES = 3
BLOCK_COLUMNS = 128
# Fewer say too little of the inputs to be better than rounding to nearest.
MIN_INPUTS = 8 * HELD_OUT_EVERY


class CalibratedRounding:
    """Rounds rows of one weight [O, K] for the inputs it has; works on any device.

    Args:
        inputs_NK: a sample of the weight's inputs, at least `MIN_INPUTS`.
    """

    def __init__(self, inputs_NK: Tensor) -> None:
        if len(inputs_NK) < MIN_INPUTS:
            raise ValueError(f"{len(inputs_NK)} inputs are too few to calibrate on: at least {MIN_INPUTS}")
        held_out = torch.arange(len(inputs_NK), device=inputs_NK.device) % HELD_OUT_EVERY == 0
        fitted = inputs_NK[~held_out].float()
        self.held_out = inputs_NK[held_out].float()
        self.H = _damped(fitted.T @ fitted / len(fitted))
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(self.H))
        upper = torch.linalg.cholesky(inverse, upper=True)
        # What an error in column k, made good as well as can be by later ones, adds to what is wanted of them.
        self.spread = (upper / upper.diagonal()[:, None]).contiguous()

    def round(self, target: Tensor, base_blocks: Tensor, base_scales: Tensor) -> tuple[Tensor, Tensor, UpdateStats]:
        """Round `target` [O, K], fp32, near a base of blocks [O, G, 16] and scales [O, G], a row independent of others.

        Scales are those of `round_merged`: the base's unless "even" ones lower a block's squared error.

        Returns:
            Blocks, scales, and how the result compares with target - base, on held-out inputs too.
        """
        _, scales, _ = round_merged(target, base_blocks, base_scales)
        steps = scale_values(scales, torch.float32).repeat_interleave(BLOCK_SIZE, dim=1)
        rounded = self._descend(target, self._gptq(target, steps), steps)

        base = dequantize_mxfp4(base_blocks, base_scales, torch.float32)
        base_cost = self._output_sq(base - target)
        # What wins by less than a mean over so few inputs is sure of may have won by luck.
        margin = len(self.held_out) ** -0.5
        accepted = self._output_sq(rounded - target) < (1 - margin) * base_cost
        blocks, _ = quantize_mxfp4(rounded, scales)
        blocks = torch.where(accepted[:, None, None], blocks, base_blocks)
        scales = torch.where(accepted[:, None], scales, base_scales)
        written = dequantize_mxfp4(blocks, scales, torch.float32)
        stats = measure_update(base, target, written)
        output_error_sq = self._output_sq(written - target).sum().item()
        return blocks, scales, replace(stats, output_sq=base_cost.sum().item(), output_error_sq=output_error_sq)

    def _gptq(self, target: Tensor, steps: Tensor) -> Tensor:
        """Numbers of the grid `steps · e2m1`, errors moved to the columns to come."""
        remaining = target.clone()
        for columns in _column_blocks(target.shape[1]):
            spread = self.spread[columns]
            rounded, errors = round_columns(remaining[:, columns], steps[:, columns], spread[:, columns], None)
            rest = slice(columns.stop, None)
            remaining[:, rest].addmm_(errors, spread[:, rest], alpha=-1)
            remaining[:, columns] = rounded
        return remaining

    def _descend(self, target: Tensor, rounded: Tensor, steps: Tensor) -> Tensor:
        """Lower the cost of `rounded`, in place, by changes of one element at a time."""
        diagonal = self.H.diagonal()
        gradient = (rounded - target) @ self.H
        for _ in range(MAX_PASSES):
            num_changed = 0
            for columns in _column_blocks(target.shape[1]):
                old = rounded[:, columns]
                # The best value of each element while all others stay; a change of one moves it by -spread.
                best = old - gradient[:, columns] / diagonal[columns]
                spread = self.H[columns, columns] / diagonal[columns]
                rounded[:, columns], changes = round_columns(best, steps[:, columns], spread, old)
                gradient.addmm_(changes, self.H[columns])
                num_changed += int(torch.count_nonzero(changes))
            if num_changed == 0:
                break
        return rounded

    def _output_sq(self, difference: Tensor) -> Tensor:
        """Squared norm over the held-out inputs of what each row's difference puts out: [O]."""
        return (difference @ self.held_out.T).square().sum(1)


def _damped(moment_KK: Tensor) -> Tensor:
    """Invertible however few the inputs were, even if all of them are zero."""
    added = (DAMPING * moment_KK.diagonal().mean()).clamp_min(torch.finfo(torch.float32).tiny)
    return moment_KK + added * torch.eye(len(moment_KK), device=moment_KK.device)


def _column_blocks(num_columns: int) -> list[slice]:
    return [slice(start, min(start + BLOCK_COLUMNS, num_columns)) for start in range(0, num_columns, BLOCK_COLUMNS)]
