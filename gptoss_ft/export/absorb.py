"""Correct a merged layer's queries, keys and values, and its router, for what rounding left in the layers before it.

They are given x' where the trained layer's are given x. What x' tells of the difference W x - W' x' is found by ridge
regression and added to weight and bias, which every merged format holds in more than 4 bits.

T tokens of all rows · H hidden · O outputs · E experts · K of them chosen
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
RULES = ("corrected attention and router 1", RIDGES, HELD_OUT_EVERY)


@torch.no_grad()
def attention_corrections(
    trained: nn.Module, merged: nn.Module, trained_rows: Sequence[Tensor], merged_rows: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Weights and biases, bf16, to put into a merged decoder layer, by their names in it.

    A projection has none where it would not put out more of what the trained one does on the rows held out.

    Args:
        trained, merged: the decoder layers.
        trained_rows, merged_rows: what each is given of each row, `[1, T, H]`.
    """
    normed_TH, merged_TH = (
        torch.cat([layer.input_layernorm(row)[0] for row in rows])
        for layer, rows in ((trained, trained_rows), (merged, merged_rows))
    )
    held_out_T = _held_out([row.shape[1] for row in merged_rows])
    found: dict[str, Tensor] = {}
    for name in PROJECTIONS:
        projection = getattr(merged.self_attn, name)
        missing_TO = getattr(trained.self_attn, name)(normed_TH).float() - projection(merged_TH).float()
        correction = _fit(merged_TH.float(), missing_TO, held_out_T)
        found |= {f"self_attn.{name}.{part}": values for part, values in _added(projection, correction).items()}
    return found


@torch.no_grad()
def router_correction(
    trained: nn.Module, merged: nn.Module, trained_rows: Sequence[Tensor], merged_rows: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Weight and bias, bf16, to put into a merged router, by their names in it.

    None where its logits would not come nearer to the trained one's on the rows held out, or its choices not agree
    with the trained one's as often.

    Args:
        trained, merged: the routers, which give logits `[T, E]`, scores and choices `[T, K]`.
        trained_rows, merged_rows: what each is given of each row, `[T, H]`.
    """
    merged_TH = torch.cat(list(merged_rows))
    held_out_T = _held_out(list(map(len, merged_rows)))
    wanted_TE, _, wanted_TK = trained(torch.cat(list(trained_rows)))
    logits_TE, _, chosen_TK = merged(merged_TH)
    found = _added(merged, _fit(merged_TH.float(), wanted_TE.float() - logits_TE.float(), held_out_T))
    if not found:
        return {}
    corrected_TE = merged_TH @ found.get("weight", merged.weight).T + found["bias"]
    corrected_TK = corrected_TE.topk(chosen_TK.shape[1]).indices
    wanted, before, after = (choices[held_out_T] for choices in (wanted_TK, chosen_TK, corrected_TK))
    return found if _num_shared(after, wanted) >= _num_shared(before, wanted) else {}


def _held_out(lengths: Sequence[int]) -> Tensor:
    """Which of all rows' tokens judge what is fitted to the others, `[T]`."""
    return torch.cat([torch.full((length,), number % HELD_OUT_EVERY == 0) for number, length in enumerate(lengths)])


def _added(linear: nn.Module, correction: dict[str, Tensor]) -> dict[str, Tensor]:
    """The corrected parameters."""
    parameters = {part: linear.get_parameter(part) for part in correction}
    return {part: (old.float() + correction[part]).to(old.dtype) for part, old in parameters.items()}


def _num_shared(chosen_TK: Tensor, wanted_TK: Tensor) -> int:
    """How many of the wanted experts were chosen."""
    return int((chosen_TK[:, :, None] == wanted_TK[:, None, :]).sum())


def _fit(inputs_TH: Tensor, missing_TO: Tensor, held_out_T: Tensor) -> dict[str, Tensor]:
    """What to add to the weight `[O, H]` and the bias `[O]`; nothing where neither helps what is held out, or nothing
    is fitted, or where inputs or outputs are no numbers."""
    if held_out_T.all() or not (inputs_TH.isfinite().all() and missing_TO.isfinite().all()):
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
