"""Correct a merged layer's queries, keys and values for what rounding left in the layers before it.

They are given x' where the trained layer's are given x. What x' tells of the difference W x - W' x' is found by ridge
regression and added to weight and bias, which every merged format holds in more than 4 bits.

T tokens of all rows · H hidden · O outputs
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gptoss_ft.export.ridge import best_ridge

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
# See `best_ridge`.
RIDGES = (10.0, 1.0, 0.1, 0.01)
# Whole rows are held out, since the tokens of one have seen each other.
HELD_OUT_EVERY = 5
# What decides a result, for those who keep results: raise the number when methods change.
RULES = ("corrected attention 1", RIDGES, HELD_OUT_EVERY)


@torch.no_grad()
def corrections(
    trained: nn.Module, merged: nn.Module, trained_rows: Sequence[Tensor], merged_rows: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Weights and biases, bf16, to put into a merged decoder layer, by their names in it.

    A projection has none where it would not put out more of what the trained one does on the rows held out.

    Args:
        trained, merged: the decoder layers.
        trained_rows, merged_rows: what each is given of each row, `[1, T, H]`.
    """
    held_out_T = torch.cat(
        [torch.full((row.shape[1],), number % HELD_OUT_EVERY == 0) for number, row in enumerate(merged_rows)]
    )
    if held_out_T.all():
        return {}
    normed_TH, merged_TH = (
        torch.cat([layer.input_layernorm(row)[0] for row in rows])
        for layer, rows in ((trained, trained_rows), (merged, merged_rows))
    )
    found: dict[str, Tensor] = {}
    for name in PROJECTIONS:
        projection = getattr(merged.self_attn, name)
        missing_TO = getattr(trained.self_attn, name)(normed_TH).float() - projection(merged_TH).float()
        correction = _fit(merged_TH.float(), missing_TO, held_out_T)
        for part, values in correction.items():
            parameter = getattr(projection, part)
            found[f"self_attn.{name}.{part}"] = (parameter.float() + values).to(parameter.dtype)
    return found


def _fit(inputs_TH: Tensor, missing_TO: Tensor, held_out_T: Tensor) -> dict[str, Tensor]:
    """What to add to the weight `[O, H]` and the bias `[O]`; nothing where neither helps what is held out,
    or where inputs or outputs are no numbers."""
    if not (inputs_TH.isfinite().all() and missing_TO.isfinite().all()):
        return {}
    fitted_T = ~held_out_T
    mean_H, mean_O = inputs_TH[fitted_T].mean(0), missing_TO[fitted_T].mean(0)
    inputs_TH, centred_TO = inputs_TH - mean_H, missing_TO - mean_O
    weight_OH = best_ridge(
        (inputs_TH[fitted_T], centred_TO[fitted_T]), (inputs_TH[held_out_T], centred_TO[held_out_T]), RIDGES
    )
    left_TO = centred_TO[held_out_T]
    if weight_OH is not None:
        left_TO = left_TO - inputs_TH[held_out_T] @ weight_OH.T
    if not left_TO.square().sum() < missing_TO[held_out_T].square().sum():
        return {}
    if weight_OH is None:
        return {"bias": mean_O}
    return {"weight": weight_OH, "bias": mean_O - weight_OH @ mean_H}
