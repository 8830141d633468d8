"""Softmax cross entropy in the compiled library. T rows · V vocabulary"""

import torch
from torch import Tensor

from gptoss_ft.kernels.cpu_library import INT, LONG, POINTER, check, common, function


def cross_entropy(logits_TV: Tensor, targets_T: Tensor, weights_T: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.cross_entropy` of fp32 or bf16 logits, whose memory becomes that of the gradient.

    Raises:
        ValueError: if shapes do not fit together or a target is no class; nothing has been overwritten then.
    """
    rows, vocabulary = logits_TV.shape
    if targets_T.shape != (rows,) or weights_T.shape != (rows,):
        raise ValueError(f"{rows} rows of logits need as many targets and weights, not {targets_T.shape}")
    if rows and not (int(targets_T.min()) >= 0 and int(targets_T.max()) < vocabulary):
        raise ValueError(f"targets must be from 0 to {vocabulary - 1}, not {targets_T.min()} to {targets_T.max()}")
    losses_T = torch.empty(rows, dtype=torch.float64)
    gradient_TV, targets_T, weights_T = logits_TV.contiguous(), targets_T.long().contiguous(), weights_T.float()
    weights_T = weights_T.contiguous()
    # isa, threads, dtype, logits, targets, weights, T, V, losses
    call = function("gptoss_ft_cross_entropy", INT, INT, INT, POINTER, POINTER, POINTER, LONG, LONG, POINTER)
    pointers = (gradient_TV.data_ptr(), targets_T.data_ptr(), weights_T.data_ptr())
    check(call(*common(logits_TV.dtype), *pointers, rows, vocabulary, losses_T.data_ptr()))
    return losses_T.float(), gradient_TV
