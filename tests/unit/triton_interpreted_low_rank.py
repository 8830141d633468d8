"""LoRA's Triton kernels in Triton's interpreter, under the fixture and the bounds of `triton_interpreted`."""

from itertools import accumulate

import pytest
import torch
from torch import Tensor
from triton_interpreted import assert_as_exact_as_torch, fenced, poisoned_memory

from gptoss_ft.kernels import reference
from gptoss_ft.kernels.gpu import launch, low_rank

__all__ = ["poisoned_memory"]

# Of rows and factors.
DTYPES = ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32))
# Rows of each expert, ranks, columns: none and one; rows and columns that fill no tile; two tiles of ranks; sums in
# parts, over the columns and over the rows of one expert.
CASES = [
    ((0, 0, 0), 16, 32),
    ((0, 1, 0, 2), 1, 40),
    ((3, 0, 19), 5, 313),
    ((17, 90, 0, 64), 16, 130),
    ((9, 70), 64, 72),
    ((9, 0, 30), 70, 72),
    ((3, 0, 40), 8, 560),
    ((600,), 4, 40),
]


def layouts(factor_ERI: Tensor) -> list[Tensor]:
    """The same numbers as rows in order, with the expert's stride the smaller one, and as PEFT keeps B."""
    by_rank = factor_ERI.transpose(0, 1).contiguous().transpose(0, 1)
    peft = factor_ERI.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert peft.stride(0) == 1
    return [factor_ERI, by_rank, peft]


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "R", "I"), CASES, ids=str)
def test_products_err_like_plain_torch(rows, R, I, dtypes):
    (dtype, factor_dtype), ends, E = dtypes, list(accumulate(rows)), len(rows)
    x, y, h = torch.randn(ends[-1], I).to(dtype), torch.randn(ends[-1], I).to(dtype), torch.randn(ends[-1], R)
    # What is rounded to bf16 by torch, on a GPU and not by the interpreter.
    h, factor = h.to(dtype).float(), torch.randn(E, R, I).to(dtype).to(factor_dtype)
    for layout, experts in zip(layouts(factor), (None, frozenset({0, 2}), frozenset({1})), strict=True):
        assert_as_exact_as_torch(
            low_rank.low_rank_down(fenced(x), layout, ends, experts),
            reference.low_rank_down(x, factor, ends, experts),
            reference.low_rank_down(x.double(), factor.double(), ends, experts),
        )
        sums = [fenced(y), y.clone(), y.double()]
        low_rank.low_rank_up_(sums[0], fenced(h), layout, 0.5, ends, experts)
        reference.low_rank_up_(sums[1], h, factor, 0.5, ends, experts)
        reference.low_rank_up_(sums[2], h.double(), factor.double(), 0.5, ends, experts)
        assert_as_exact_as_torch(*sums)
        gradients = [torch.empty_like(layout), torch.empty_like(factor), torch.empty_like(factor, dtype=torch.float64)]
        low_rank.low_rank_gradient_(gradients[0], fenced(h), fenced(x), 0.5, ends, experts)
        reference.low_rank_gradient_(gradients[1], h, x, 0.5, ends, experts)
        reference.low_rank_gradient_(gradients[2], h.double(), x.double(), 0.5, ends, experts)
        assert_as_exact_as_torch(*gradients)


def test_what_is_not_adapted_is_zero_and_its_rows_stay():
    x, factor, h, ends = torch.randn(9, 40), torch.randn(3, 4, 40), torch.randn(9, 4), [2, 6, 9]
    y, gradient = x.clone(), torch.empty_like(factor)
    assert not low_rank.low_rank_down(x, factor, ends, {1})[[0, 1, 6, 7, 8]].any()
    low_rank.low_rank_up_(y, h, factor, 1.0, ends, {1})
    assert torch.equal((y != x).any(1).nonzero().flatten(), torch.arange(2, 6))
    low_rank.low_rank_gradient_(gradient, h, x, 1.0, ends, {1})
    assert gradient[1].all() and not gradient[[0, 2]].any()


def test_cases_lead_through_every_tile_and_sums_in_parts():
    bf16 = [(rows, *shape) for rows, *shape in CASES if any(rows)]
    ends = [list(accumulate(rows)) for rows, *_ in bf16]
    for tiles in (low_rank.DOWN_TILES, low_rank.UP_TILES):
        assert {launch.tile_for(tiles, each) for each in ends} == set(tiles)
    assert {low_rank.ranks_of_a_tile(R, torch.bfloat16) for _, R, _ in bf16} == {16, 64}
    # The columns of one case and the rows of another.
    assert low_rank._num_parts(programs=2, steps=-(-560 // 64)) == 2
    assert low_rank._num_parts(programs=1, steps=-(-600 // 64)) == 2


def test_offsets_past_the_range_of_32_bits():
    # Memory that nobody touches costs nothing; fresh tensors must not be filled.
    torch.use_deterministic_algorithms(False)
    T, R, I, ends, adapted = 800_000, 2, 2880, [800_000 - 3, 800_000], {1}
    x, h = torch.empty(T, I, dtype=torch.bfloat16), torch.empty(T, R)
    far = torch.empty(2**31 + R * I, dtype=torch.bfloat16).as_strided((2, R, I), (2**31, I, 1))
    x[-3:], h[-3:] = torch.randn(3, I), torch.randn(3, R)
    far[1], near = torch.randn(R, I), torch.empty(2, R, I)
    assert T * I > 2**31
    rows, factor = x[-3:].float(), far[1:].float()
    found = low_rank.low_rank_down(x, far, ends, adapted)[-3:]
    torch.testing.assert_close(found, reference.low_rank_down(rows, factor, [3]), rtol=1e-4, atol=1e-3)
    low_rank.low_rank_gradient_(near, h, x, 0.5, ends, adapted)
    expected = torch.empty(1, R, I)
    reference.low_rank_gradient_(expected, h[-3:], rows, 0.5, [3])
    torch.testing.assert_close(near[1:], expected, rtol=1e-4, atol=1e-4)
    low_rank.low_rank_up_(x, h, far, 0.5, ends, adapted)
    reference.low_rank_up_(rows, h[-3:], factor, 0.5, [3])
    torch.testing.assert_close(x[-3:].float(), rows, rtol=2**-7, atol=1e-3)

    # One expert's own gradient, whose second rank is far behind its first.
    apart = torch.empty(2**31 + I, dtype=torch.bfloat16).as_strided((1, R, I), (1, 2**31, 1))
    x, h = torch.randn(3, I, dtype=torch.bfloat16), torch.randn(3, R)
    low_rank.low_rank_gradient_(apart, h, x, 0.5, [3])
    reference.low_rank_gradient_(expected, h, x.float(), 0.5, [3])
    torch.testing.assert_close(apart.float(), expected, rtol=2**-7, atol=1e-3)


def test_mistakes_are_errors_and_reach_no_kernel():
    x, factor, h = torch.randn(5, 32), torch.randn(2, 4, 32), torch.randn(5, 4)
    for ends in ([2, 6], [2, 4], [5], [6, 5], [-1, 5]):
        with pytest.raises(ValueError, match="rise to 5"):
            low_rank.low_rank_down(x, factor, ends)
    with pytest.raises(ValueError, match="do not fit together"):
        low_rank.low_rank_down(x[:, :31], factor, [2, 5])
    with pytest.raises(ValueError, match="do not fit together"):
        low_rank.low_rank_gradient_(factor, h[:, :3], x, 1.0, [2, 5])
    with pytest.raises(ValueError, match="y must be contiguous"):
        low_rank.low_rank_up_(torch.randn(32, 5).t(), h, factor, 1.0, [2, 5])
