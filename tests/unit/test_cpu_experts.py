"""The CPU library's activation, combination and LoRA products against the torch reference in fp64."""

from itertools import accumulate

import pytest
import torch

from gptoss_ft.kernels import cpu_experts, cpu_library, reference

pytestmark = pytest.mark.skipif(cpu_library.library() is None, reason="the CPU library was not built: no C++ compiler")

DTYPES = [torch.bfloat16, torch.float32]
# Shorter than any vector, tails of vectors, several strips of 64 and a tail.
COLUMNS = [3, 40, 213]
# Rows of each expert, ranks and columns. Rows: none, one, tails of tiles of 3 and 6, more than one run of 48 and one
# panel of 64. Ranks: tails of tiles of 4 and 6.
PRODUCTS = [
    ((0, 0), 4, 40),
    ((1, 0, 3), 1, 3),
    ((1, 0, 3), 70, 213),
    ((5, 70, 0, 131), 1, 213),
    ((5, 70, 0, 131), 6, 40),
    ((5, 70, 0, 131), 16, 213),
    ((4, 5), 256, 64),
]
LIMIT = 2.0  # so that many values are beyond it


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def by_rank_fastest(factor_ERI):
    """The same values as LoRA's B has them once transposed: the expert's stride is the smaller one."""
    return factor_ERI.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.usefixtures("poisoned_memory", "isa")
def test_activation_and_its_gradients_err_at_most_twice_as_much_as_torch(columns, dtype, assert_as_exact_as_torch):
    gate_up, d_z = (2 * torch.randn(19, 2 * columns)).to(dtype), torch.randn(19, columns).to(dtype)
    gate_up[0, :6] = torch.tensor([LIMIT, LIMIT, -LIMIT, -LIMIT, 50, 50], dtype=dtype)
    # Far out the sigmoid vanishes.
    gate_up[1, :6] = torch.tensor([-200, 1, -1e30, 1, -20, 3], dtype=dtype)
    weights = torch.rand(19)
    kwargs = {"alpha": 1.702, "limit": LIMIT}

    def autograd(dtype):
        h, w = gate_up.to(dtype).requires_grad_(), weights.to(dtype).requires_grad_()
        act = reference.clamped_swiglu(h, **kwargs)
        z = w[:, None] * act
        return act.detach(), z.detach(), *torch.autograd.grad(z, (h, w), d_z.to(dtype))

    act = cpu_experts.clamped_swiglu(gate_up, **kwargs)
    z, d_gate_up, d_weights = cpu_experts.weighted_swiglu_backward(gate_up, d_z, weights, **kwargs)
    ours = (act, z, d_gate_up, d_weights.to(dtype))
    names = ("act", "z", "d_gate_up", "d_weights")
    for name, *results in zip(names, ours, autograd(dtype), autograd(torch.float64), strict=True):
        assert_as_exact_as_torch(*results, name)
    # The same again of the reference's own formula.
    for one, other in zip(
        reference.weighted_swiglu_backward(gate_up.double(), d_z.double(), weights.double(), **kwargs),
        autograd(torch.float64)[1:],
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("isa")
def test_nan_stays_nan(dtype):
    gate_up = torch.zeros(1, 2 * 40, dtype=dtype)
    gate_up[0, 10], gate_up[0, 31] = torch.nan, torch.nan
    act = cpu_experts.clamped_swiglu(gate_up)
    assert act.isnan()[0].nonzero().flatten().tolist() == [5, 15]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("choices", [1, 4])
@pytest.mark.usefixtures("poisoned_memory", "isa")
def test_combine_errs_at_most_twice_as_much_as_torch(columns, choices, dtype, assert_as_exact_as_torch):
    y, weights = torch.randn(18 * choices, columns).to(dtype), torch.rand(18, choices)
    slots = torch.randperm(18 * choices).view(18, choices)
    for w in (weights, None):
        assert_as_exact_as_torch(
            cpu_experts.combine(y, slots, w),
            reference.combine(y, slots, w),
            reference.combine(y.double(), slots, None if w is None else w.double()),
        )


@pytest.mark.parametrize("dtypes", [(x, f) for x in DTYPES for f in DTYPES], ids=str)
@pytest.mark.parametrize("case", PRODUCTS, ids=str)
@pytest.mark.usefixtures("poisoned_memory", "isa")
def test_low_rank_products_err_at_most_twice_as_much_as_torch(case, dtypes, assert_as_exact_as_torch):
    (rows, ranks, columns), (dtype, factor_dtype) = case, dtypes
    ends, E, N = list(accumulate(rows)), len(rows), sum(rows)
    x, factor = torch.randn(N, columns).to(dtype), torch.randn(E, ranks, columns).to(factor_dtype)
    h, y = torch.randn(N, ranks).to(dtype).float(), torch.randn(N, columns).to(dtype)
    for layout, experts in ((factor, None), (by_rank_fastest(factor), frozenset({0, 3}))):
        assert_as_exact_as_torch(
            cpu_experts.low_rank_down(x, layout, ends, experts),
            reference.low_rank_down(x, factor, ends, experts),
            reference.low_rank_down(x.double(), factor.double(), ends, experts),
            "down",
        )
        sums = [y.clone(), y.clone(), y.double()]
        cpu_experts.low_rank_up_(sums[0], h, layout, 0.5, ends, experts)
        reference.low_rank_up_(sums[1], h, factor, 0.5, ends, experts)
        reference.low_rank_up_(sums[2], h.double(), factor.double(), 0.5, ends, experts)
        assert_as_exact_as_torch(*sums, "up")
        gradients = [torch.empty_like(layout), torch.empty_like(factor), torch.empty_like(factor, dtype=torch.float64)]
        cpu_experts.low_rank_gradient_(gradients[0], h, x, 0.5, ends, experts)
        reference.low_rank_gradient_(gradients[1], h, x, 0.5, ends, experts)
        reference.low_rank_gradient_(gradients[2], h.double(), x.double(), 0.5, ends, experts)
        assert_as_exact_as_torch(*gradients, "gradient")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("isa")
def test_every_number_of_threads_gives_the_same_bits(dtype, with_threads):
    ends = [60, 60, 200]
    x, factor, gate_up = torch.randn(200, 213), torch.randn(3, 5, 213), torch.randn(200, 426)
    x, factor, gate_up = x.to(dtype), factor.to(dtype), gate_up.to(dtype)
    slots, weights = torch.randperm(200).view(50, 4), torch.rand(200)

    def everything():
        h, y, gradient = cpu_experts.low_rank_down(x, factor, ends), x.clone(), torch.empty_like(factor)
        cpu_experts.low_rank_up_(y, h, factor, 0.5, ends)
        cpu_experts.low_rank_gradient_(gradient, h, x, 0.5, ends)
        act = cpu_experts.clamped_swiglu(gate_up)
        backward = cpu_experts.weighted_swiglu_backward(gate_up, x, weights)
        return h, y, gradient, act, *backward, cpu_experts.combine(x, slots, weights.view(50, 4))

    first, *others = with_threads(everything)
    for other in others:
        assert all(torch.equal(one, another) for one, another in zip(first, other, strict=True))


def test_mistakes_are_errors_and_never_reach_the_library():
    x, factor, h = torch.randn(5, 32), torch.randn(2, 4, 32), torch.randn(5, 4)
    for ends in ([2, 6], [2, 4], [5], [6, 5], [-1, 5]):
        with pytest.raises(ValueError, match="rise to 5"):
            cpu_experts.low_rank_down(x, factor, ends)
    with pytest.raises(ValueError, match="do not fit together"):
        cpu_experts.low_rank_down(x[:, :31], factor, [2, 5])
    with pytest.raises(ValueError, match="do not fit together"):
        cpu_experts.low_rank_up_(x, h[:, :3], factor, 1.0, [2, 5])
    with pytest.raises(ValueError, match="y must be contiguous"):
        cpu_experts.low_rank_up_(x.T, h, factor, 1.0, [2, 5])
    with pytest.raises(ValueError, match="columns of d_factor must be contiguous"):
        cpu_experts.low_rank_gradient_(torch.empty(2, 32, 4).mT, h, x, 1.0, [2, 5])
    with pytest.raises(ValueError, match="slots must be rows of y, 0 to 4"):
        cpu_experts.combine(x, torch.tensor([[0, 5]]), None)
    with pytest.raises(ValueError, match=r"weights \(1, 1\) must be \(1, 2\)"):
        cpu_experts.combine(x, torch.tensor([[0, 4]]), torch.ones(1, 1))
    with pytest.raises(ValueError, match=r"must be \[T, 2·I\]"):
        cpu_experts.clamped_swiglu(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"are not \[T, 2·I\], \[T, I\] of one dtype"):
        cpu_experts.weighted_swiglu_backward(torch.zeros(2, 4), torch.zeros(2, 2).bfloat16(), torch.ones(2))
