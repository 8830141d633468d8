"""Dense experts by torch's grouped_mm, as GPUs run them, on the CPU: against fp64, and what they refuse."""

from itertools import accumulate

import pytest
import torch

from gptoss_ft.kernels import reference
from gptoss_ft.kernels.gpu import dense_experts


@pytest.mark.parametrize("rows", [(0, 0), (0, 1, 0), (3, 0, 19), (17, 70, 0, 64)], ids=str)
@pytest.mark.parametrize("strided", [False, True])
def test_products_err_at_most_twice_as_much_as_plain_torch(rows, strided, assert_as_exact_as_torch):
    torch.manual_seed(0)
    ends, (E, O, I) = list(accumulate(rows)), (len(rows), 104, 296)
    x, dy, w = (torch.randn(shape).bfloat16() for shape in ((ends[-1], I), (ends[-1], O), (E, O, I)))
    layout = (lambda tensor: tensor.t().contiguous().t()) if strided else torch.clone
    assert_as_exact_as_torch(
        dense_experts.grouped_dense(layout(x), w, None, ends),
        reference.grouped_dense(x, w, None, ends),
        reference.grouped_dense(x.double(), w.double(), None, ends),
    )
    assert_as_exact_as_torch(
        dense_experts.grouped_dense_dx(layout(dy), w, ends),
        reference.grouped_dense_dx(dy, w, ends),
        reference.grouped_dense_dx(dy.double(), w.double(), ends),
    )


def test_no_rows_are_not_multiplied(monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", None)
    rows, w = torch.empty(0, 32).bfloat16(), torch.randn(2, 16, 32).bfloat16()
    assert dense_experts.grouped_dense(rows, w, None, [0, 0]).shape == (0, 16)
    assert dense_experts.grouped_dense_dx(rows[:, :16], w, [0, 0]).shape == (0, 32)


def test_what_grouped_mm_cannot_take_is_refused_in_words():
    x, w, ends = torch.randn(5, 32).bfloat16(), torch.randn(2, 16, 32).bfloat16(), [2, 5]
    shifted = torch.cat((x.flatten()[:1], x.flatten()))[1:].view_as(x)
    assert dense_experts.refusal(x, w, None, ends) == dense_experts.refuses_dx(x[:, :16], w, ends) == ""
    for rows, weights, bias, reason in (
        (x, w.float(), None, "different dtypes"),
        (x, w.mT.contiguous().mT, None, "not contiguous"),
        (x, w[:, :12].contiguous(), None, "12 or 32 features"),
        (shifted, w, None, "do not start at"),
        (x, w, torch.zeros(2, 16), "no bias"),
    ):
        assert reason in dense_experts.refusal(rows, weights, bias, ends)
