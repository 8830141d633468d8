"""Choose numbers of a grid, column after column, so that errors cancel in the outputs of a weight.

Shape suffixes: O rows · K columns

With the second moment H = E[x xᵀ] of the inputs, a rounding Q of the target T costs tr (Q - T) H (Q - T)ᵀ. Two known
methods follow each other. GPTQ (Frantar et al., arXiv 2210.17323) fixes column after column and lets the columns to
come make good its error. It equals Babai's nearest plane (Chen et al., arXiv 2507.18553), and in that form needs one
triangular factor and no inverse: with H = M Mᵀ and M upper triangular the cost is |(Q - T) M|², of which each column
sees earlier columns only. Coordinate descent then goes over the columns again while changes of single elements lower
the cost. It changes few of them, so that keeping the gradient (Q - T) H up to date costs little.
"""

import torch
from torch import Tensor

from gptoss_ft.kernels.dispatch import descend_, round_columns

# After so many passes of coordinate descent hardly a row changes; 3 would leave 2 to 10 % more error.
MAX_PASSES = 16
# As a share of the diagonal's mean.
LEAST_DAMPING = 1e-4
BLOCK_COLUMNS = 128


class Sweeps:
    """Rounds rows for the inputs of a second moment [K, K], fp32.

    Args:
        damping: by what share of itself the diagonal is raised.
    """

    def __init__(self, moment_KK: Tensor, damping: float) -> None:
        self.damping = damping
        num_columns = len(moment_KK)
        self.H = moment_KK.clone()
        # At least something, so that there is a factor even if some inputs are zero.
        floor = (LEAST_DAMPING * moment_KK.diagonal().mean()).clamp_min(torch.finfo(torch.float32).tiny)
        self.H.diagonal().mul_(1 + damping).add_(floor)
        self.blocks = [slice(k, min(k + BLOCK_COLUMNS, num_columns)) for k in range(0, num_columns, BLOCK_COLUMNS)]
        upper = torch.linalg.cholesky(self.H.flip(0, 1)).flip(0, 1).contiguous()
        self.pivots_sq = upper.diagonal().square()
        # What an error of one in row k takes from what is wanted of column j.
        self.spread = upper.div_(upper.diagonal().clone())

    def round(self, target: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers of the grid `steps · e2m1` for `target`, both [O, K] in fp32; each row by itself.

        Returns:
            What was rounded, and what it costs by the damped moment: [O].
        """
        rounded, gradient = self._gptq(target, steps)
        descend_(rounded, gradient, steps, self.H, MAX_PASSES)
        return rounded, torch.linalg.vecdot(rounded - target, gradient)

    def _gptq(self, target: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """What was rounded, and the gradient there."""
        rounded, missed = torch.empty_like(target), torch.zeros_like(target)
        for block in self.blocks:
            # `missed` is what earlier columns leave for these to make good.
            wanted = target[:, block] - missed[:, block]
            spread = self.spread[block]
            rounded[:, block], errors = round_columns(wanted, target[:, block], steps[:, block], spread[:, block])
            missed[:, block.start :].addmm_(errors, spread[:, block.start :])
        # (Q - T) H = (Q - T) M Mᵀ, and (Q - T) M is `missed` but for the pivots.
        missed.mul_(self.pivots_sq)
        gradient = torch.empty_like(target)
        for block in self.blocks:
            rest = slice(block.start, None)
            torch.mm(missed[:, rest], self.spread[block, rest].T, out=gradient[:, block])
        return rounded, gradient
