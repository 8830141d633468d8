"""Ridge regression whose strength is chosen by inputs that were not fitted.

N fitted inputs · M held-out ones · K columns · O outputs
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def best_ridge(
    fitted: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor], ridges: Sequence[float]
) -> Tensor | None:
    """A weight `[O, K]` that makes outputs of inputs, by the ridge that is best on the pairs held out.

    Args:
        fitted, held_out: inputs `[N, K]` and outputs `[N, O]`, and such with M rows.
        ridges: what is added to the diagonal of the inputs' second moment, as a share of its mean.

    Returns:
        None where no weight is better than none at all.
    """
    (inputs_NK, outputs_NO), (inputs_MK, outputs_MO) = fitted, held_out
    num_inputs, num_columns = inputs_NK.shape
    # With f the inputs, fᵀ (f fᵀ + λ)⁻¹ = (fᵀ f + λ)⁻¹ fᵀ: the smaller matrix is solved for.
    is_wide = num_columns > num_inputs
    gram = inputs_NK @ inputs_NK.T if is_wide else inputs_NK.T @ inputs_NK
    right = outputs_NO if is_wide else inputs_NK.T @ outputs_NO
    # f' fᵀ for held-out f', or f': what a solution is multiplied with to give outputs.
    left = inputs_MK @ inputs_NK.T if is_wide else inputs_MK
    lowest, best = outputs_MO.square().sum(), None
    for ridge in ridges:
        ridged = gram.clone()
        ridged.diagonal().add_(
            (ridge * inputs_NK.square().sum() / num_columns).clamp_min(torch.finfo(torch.float32).tiny)
        )
        solution = torch.cholesky_solve(right, torch.linalg.cholesky(ridged))
        cost = (outputs_MO - left @ solution).square().sum()
        if cost < lowest:
            lowest, best = cost, solution
    if best is None:
        return None
    return (inputs_NK.T @ best if is_wide else best).T.contiguous()
