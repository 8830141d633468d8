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

from gptoss_ft.kernels.dispatch import add_sparse_product_, round_columns

# The second pass of coordinate descent changes 0.1 to 0.8 % of the elements, the third half of that; more do not help.
MAX_PASSES = 3
BLOCK_COLUMNS = 128


class Sweeps:
    """Rounds rows for the inputs of a second moment [K, K], fp32.

    Args:
        damping: what is added to the diagonal, as a share of its mean.
    """

    def __init__(self, moment_KK: Tensor, damping: float) -> None:
        self.damping = damping
        num_columns = len(moment_KK)
        self.H = moment_KK.clone()
        # At least something, so that there is a factor even if all inputs are zero.
        self.H.diagonal().add_((damping * moment_KK.diagonal().mean()).clamp_min(torch.finfo(torch.float32).tiny))
        self.diagonal = self.H.diagonal().clone()
        self.blocks = [slice(k, min(k + BLOCK_COLUMNS, num_columns)) for k in range(0, num_columns, BLOCK_COLUMNS)]
        upper = torch.linalg.cholesky(self.H.flip(0, 1)).flip(0, 1)
        self.pivots_sq = upper.diagonal().square()
        # What an error of one in row k takes from what is wanted of column j.
        self.spread = (upper / upper.diagonal()).contiguous()
        self.descent = [self.H[block, block] / self.diagonal[block] for block in self.blocks]

    def round(self, target: Tensor, steps: Tensor) -> Tensor:
        """Numbers of the grid `steps · e2m1` for `target`, both [O, K] in fp32; each row by itself."""
        rounded, gradient = self._gptq(target, steps)
        for _ in range(MAX_PASSES):
            if not self._descend(rounded, gradient, steps):
                break
        return rounded

    def _gptq(self, target: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """What was rounded, and the gradient there."""
        rounded, missed = torch.empty_like(target), torch.zeros_like(target)
        for block in self.blocks:
            # `missed` is what earlier columns leave for these to make good.
            wanted = target[:, block] - missed[:, block]
            spread = self.spread[block]
            rounded[:, block], errors = round_columns(wanted, steps[:, block], spread[:, block], target[:, block])
            missed[:, block.start :].addmm_(errors, spread[:, block.start :])
        # (Q - T) H = (Q - T) M Mᵀ, and (Q - T) M is `missed` but for the pivots.
        missed.mul_(self.pivots_sq)
        gradient = torch.empty_like(target)
        for block in self.blocks:
            rest = slice(block.start, None)
            torch.mm(missed[:, rest], self.spread[block, rest].T, out=gradient[:, block])
        return rounded, gradient

    def _descend(self, rounded: Tensor, gradient: Tensor, steps: Tensor) -> bool:
        """Lower the cost by changing one element at a time, once over the columns; whether any was changed."""
        has_changed = False
        for block, spread in zip(self.blocks, self.descent, strict=True):
            old = rounded[:, block]
            # The best value of each element while all others stay.
            wanted = old - gradient[:, block] / self.diagonal[block]
            rounded[:, block], changes = round_columns(wanted, steps[:, block], spread, old)
            add_sparse_product_(gradient, changes, self.H[block])
            has_changed = has_changed or bool(changes.any())
        return has_changed
