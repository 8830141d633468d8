"""Correct a merged layer's queries, keys and values, and its router, for what rounding left in the layers before it.

They are given x' where the trained layer's are given x. What x' tells of the difference W x - W' x' is found by ridge
regression and added to weight and bias, which every merged format holds in more than 4 bits.

T tokens of all rows · H hidden · O outputs · E experts · K of them chosen
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gptoss_ft.export.ridge import best_ridge

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
# See `best_ridge`.
RIDGES = (10.0, 1.0, 0.1, 0.01)
# Whole rows are held out, since the tokens of one have seen each other.
HELD_OUT_EVERY = 5
# What decides a result, for those who keep results: raise the number when methods change.
RULES = ("corrected attention and router 2", RIDGES, HELD_OUT_EVERY)


@torch.no_grad()
def attention_corrections(
    trained: nn.Module, merged: nn.Module, trained_rows: Sequence[Tensor], merged_rows: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Weights and biases, bf16, to put into a merged decoder layer, by their names in it.

    A projection has none where it would not, with numbers as they are written, put out more of what the trained one
    does on the rows held out.

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
        wanted_TO = getattr(trained.self_attn, name)(normed_TH)
        correction = _corrected(getattr(merged.self_attn, name), merged_TH, wanted_TO, held_out_T)
        found |= {f"self_attn.{name}.{part}": values for part, values in correction.items()}
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
    found = _corrected(merged, merged_TH, wanted_TE, held_out_T)
    if not found:
        return {}
    inputs_TH, wanted_TK = merged_TH[held_out_T], wanted_TK[held_out_T]
    _, _, before_TK = merged(inputs_TH)
    _, _, after_TK = functional_call(merged, found, (inputs_TH,))
    return found if _num_shared(after_TK, wanted_TK) >= _num_shared(before_TK, wanted_TK) else {}


def _held_out(lengths: Sequence[int]) -> Tensor:
    """Which of all rows' tokens judge what is fitted to the others, `[T]`."""
    return torch.cat([torch.full((length,), number % HELD_OUT_EVERY == 0) for number, length in enumerate(lengths)])


def _num_shared(chosen_TK: Tensor, wanted_TK: Tensor) -> int:
    """How many of the wanted experts were chosen."""
    return int((chosen_TK[:, :, None] == wanted_TK[:, None, :]).sum())


def _corrected(linear: nn.Module, inputs_TH: Tensor, wanted_TO: Tensor, held_out_T: Tensor) -> dict[str, Tensor]:
    """The weight `[O, H]` and the bias `[O]`, or the bias alone, that put out most of what is wanted on what is held
    out, as they are written; nothing where neither helps there, or nothing is fitted, or where inputs or outputs are no
    numbers."""
    missing_TO = wanted_TO.float() - _outputs(linear, inputs_TH)
    if held_out_T.all() or not (inputs_TH.isfinite().all() and missing_TO.isfinite().all()):
        return {}
    weight, bias = linear.get_parameter("weight"), linear.get_parameter("bias")
    fitted_T = ~held_out_T
    lowest, best = missing_TO[held_out_T].square().sum(), {}
    candidates: list[dict[str, Tensor]] = [{}]
    fitted_OH = _fit(inputs_TH.float(), missing_TO, held_out_T)
    if fitted_OH is not None:
        candidates.append({"weight": (weight.float() + fitted_OH).to(weight.dtype)})
    for found in candidates:
        # Of what was fitted, rounding to bf16 may leave anything from nothing to all, and the inputs' mean makes much
        # of that: the bias is for what the written weight leaves.
        left_TO = wanted_TO[fitted_T].float() - _outputs(linear, inputs_TH[fitted_T], found)
        found["bias"] = (bias.float() + left_TO.mean(0)).to(bias.dtype)
        left_TO = wanted_TO[held_out_T].float() - _outputs(linear, inputs_TH[held_out_T], found)
        if (cost := left_TO.square().sum()) < lowest:
            lowest, best = cost, found
    return best


def _outputs(linear: nn.Module, inputs_TH: Tensor, parameters: dict[str, Tensor] | None = None) -> Tensor:
    """What a projection, or a router before it chooses, puts out with these parameters in place of its own, fp32."""
    outputs = functional_call(linear, parameters or {}, (inputs_TH,))
    return (outputs[0] if isinstance(outputs, tuple) else outputs).float()


def _fit(inputs_TH: Tensor, missing_TO: Tensor, held_out_T: Tensor) -> Tensor | None:
    """What to add to the weight, `[O, H]`, if the bias makes good the mean; None where that is nothing."""
    fitted_T = ~held_out_T
    inputs_TH, missing_TO = (values - values[fitted_T].mean(0) for values in (inputs_TH, missing_TO))
    return best_ridge(
        (inputs_TH[fitted_T], missing_TO[fitted_T]), (inputs_TH[held_out_T], missing_TO[held_out_T]), RIDGES
    )
