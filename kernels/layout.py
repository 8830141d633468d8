"""LoRA's B of stacked experts: by expert, the fastest dimension, as PEFT keeps it, and by rank, as kernels read it.

E experts · O out features · R LoRA rank
"""

from torch import Tensor


def by_rank(B_EOR: Tensor) -> Tensor:
    """B as contiguous `[R, E, O]`; of PEFT's layout this is the transposition of a matrix."""
    E, O, R = B_EOR.shape
    return B_EOR.permute(1, 2, 0).reshape(O, R * E).t().contiguous().view(R, E, O)


def by_expert(B_REO: Tensor) -> Tensor:
    """`by_rank` undone: `[E, O, R]` in PEFT's layout."""
    R, E, O = B_REO.shape
    return B_REO.flatten(0, 1).t().contiguous().view(O, R, E).permute(2, 0, 1)
