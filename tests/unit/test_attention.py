"""Sink attention of the CPU library against the torch reference in fp64, forward and gradients.

B batch · H query heads · K key/value heads · T queries · S keys · D head dimension
"""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from gptoss_ft.kernels import cpu_attention, dispatch, reference

NAMES = ("out", "dq", "dk", "dv", "dsinks")


@dataclass(frozen=True)
class Case:
    B: int
    H: int
    K: int
    T: int
    S: int
    D: int
    window: int | None = None
    documents: tuple[int, ...] = ()  # lengths of documents, negative for padding
    forks: tuple[tuple[int, int], ...] = ()  # the token at the first place grows from the one at the second

    def documents_BS(self):
        if not self.documents:
            return None
        numbers = [-1 if length < 0 else number for number, length in enumerate(self.documents)]
        row = torch.tensor(numbers).repeat_interleave(torch.tensor(self.documents).abs())
        assert len(row) == self.S
        # Every row of the batch has its documents elsewhere.
        return torch.stack([row.roll(7 * b) for b in range(self.B)])

    def tree(self):
        """The first row of the batch is a tree with these forks; the others fork nowhere."""
        if not self.forks:
            return None
        parents = [place - 1 for place in range(self.S)]
        for place, parent in self.forks:
            parents[place] = parent
        depths = torch.arange(self.S).repeat(self.B, 1)
        until = torch.full_like(depths, self.S)
        until[0] = torch.arange(1, self.S + 1)
        for place in range(1, self.S):
            depths[0, place] = depths[0, parents[place]] + 1
            ancestor = place
            while ancestor >= 0:
                until[0, ancestor], ancestor = place + 1, parents[ancestor]
        return reference.Tree(depths, until)


# Blocks are of 96 keys, and of 384 rows (tokens times heads) forward and 96 backward; panels of 8, 16 or 32.
CASES = [
    Case(2, 8, 1, T=1, S=1, D=64),
    Case(1, 8, 1, T=1, S=203, D=64, window=128),
    Case(2, 4, 4, T=37, S=37, D=40),
    Case(1, 8, 1, T=131, S=131, D=64),
    Case(1, 8, 1, T=131, S=131, D=64, window=1),
    Case(1, 16, 2, T=210, S=210, D=64, window=50),
    Case(1, 3, 1, T=101, S=290, D=8, window=100),
    Case(1, 2, 1, T=45, S=45, D=256),
    Case(1, 200, 1, T=3, S=5, D=8),
    Case(1, 1, 1, T=450, S=450, D=16),
    Case(2, 8, 1, T=230, S=230, D=64, documents=(3, 120, 1, 106)),
    Case(2, 4, 2, T=230, S=230, D=24, window=33, documents=(-20, 100, -7, 90, -13)),
    Case(2, 8, 8, T=97, S=200, D=32, documents=(-30, 110, 60)),
    Case(2, 8, 1, T=230, S=230, D=64, forks=((60, 20), (150, 100), (200, 20))),
    Case(1, 4, 2, T=330, S=330, D=24, window=33, forks=((12, 9), (110, 40), (290, 150))),
    Case(1, 4, 2, T=230, S=230, D=16, window=9, documents=(230,), forks=tuple((at, at - 2) for at in range(9, 200, 2))),
]


def operands(case, dtype, seed=0):
    """q, k, v, sinks and the gradient of the output, laid out as transformers does: `[B, T, H, D]`, transposed."""
    generator = torch.Generator().manual_seed(seed)

    def by_token(heads, length):
        return torch.randn(case.B, length, heads, case.D, generator=generator).to(dtype).transpose(1, 2)

    return SimpleNamespace(
        forward=(
            by_token(case.H, case.T),
            by_token(case.K, case.S),
            by_token(case.K, case.S),
            torch.randn(case.H, generator=generator).to(dtype),
        ),
        d_out=by_token(case.H, case.T),
        settings={
            "scaling": case.D**-0.5,
            "window": case.window,
            "documents_BS": case.documents_BS(),
            "tree": case.tree(),
        },
    )


def by_reference(given, dtype):
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in given.forward]
    out = reference.sink_attention(*leaves, **given.settings)
    return [out.detach(), *torch.autograd.grad(out, leaves, given.d_out.to(dtype))]


def by_library(given):
    out, lse = cpu_attention.sink_attention_forward(*given.forward, **given.settings)
    gradients = cpu_attention.sink_attention_backward(given.d_out, *given.forward, out, lse, **given.settings)
    return [out, *gradients]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.usefixtures("poisoned_memory", "isa")
def test_output_and_gradients_err_at_most_twice_as_much_as_plain_torch(case, dtype):
    given = operands(case, dtype)
    results = zip(NAMES, by_library(given), by_reference(given, dtype), by_reference(given, torch.float64), strict=True)
    for name, ours, plain, truth in results:
        assert ours.shape == truth.shape and ours.dtype == dtype
        error, budget = ((tensor.double() - truth).abs().max() for tensor in (ours, plain))
        # The gradient of a logit is the difference of two sums of D products. Plain torch forms both from the same sums
        # and with few keys hardly errs; here one is formed from the rounded output.
        floor = truth.abs().max() * (2**-9 if dtype == torch.bfloat16 else 2**-18)
        assert error <= max(2 * budget, floor), f"{name}: {error:.2e} > 2 x {budget:.2e}"


def test_a_branch_attends_as_if_it_stood_alone():
    """The reference itself: every branch of a tree, with its window, against the same tokens without the others."""
    case = Case(1, 2, 1, T=40, S=40, D=16, window=6, forks=((12, 5), (20, 14), (30, 5)))
    q, k, v, sinks = (tensor.double() for tensor in operands(case, torch.float32).forward)
    out = reference.sink_attention(q, k, v, sinks, scaling=0.25, window=6, documents_BS=None, tree=case.tree())
    trunk = list(range(6))
    for rest in ([*range(6, 12)], [*range(12, 20)], [*range(12, 15), *range(20, 30)], [*range(30, 40)]):
        branch = trunk + rest
        alone = (tensor[:, :, branch] for tensor in (q, k, v))
        expected = reference.sink_attention(*alone, sinks, scaling=0.25, window=6, documents_BS=None)
        torch.testing.assert_close(out[:, :, branch], expected, rtol=0, atol=1e-14)


@pytest.mark.usefixtures("isa")
def test_padding_is_zero_and_has_no_gradient_and_lse_includes_the_sink():
    case = Case(1, 4, 2, T=120, S=120, D=16, documents=(-10, 50, -20, 40))
    given = operands(case, torch.float32)
    padding = case.documents_BS()[0] < 0
    out, dq, dk, dv, _ = by_library(given)
    for tensor in (out, dq, dk, dv):
        assert tensor[:, :, padding].abs().max() == 0
        assert tensor[:, :, ~padding].abs().amax(-1).min() > 0
    _, lse = cpu_attention.sink_attention_forward(*given.forward, **given.settings)
    torch.testing.assert_close(lse[:, :, padding], given.forward[3][None, :, None].expand(1, 4, 30))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.usefixtures("isa")
def test_every_number_of_threads_gives_the_same_bits(dtype):
    before = torch.get_num_threads()
    for case in (Case(2, 4, 2, T=330, S=400, D=16), Case(1, 8, 1, T=330, S=330, D=16, window=100)):
        given, results = operands(case, dtype), []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(by_library(given))
        torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(mine, first) for mine, first in zip(other, results[0], strict=True))


@pytest.mark.usefixtures("isa")
def test_any_strides_give_the_same_bits():
    given = operands(Case(2, 6, 2, T=50, S=70, D=24), torch.bfloat16)
    expected = by_library(given)
    for relay in (
        torch.Tensor.contiguous,
        lambda tensor: torch.nn.functional.pad(tensor, (3, 5))[..., 3:-5],
        lambda tensor: tensor.mT.contiguous().mT,
    ):
        given.forward = (*(relay(tensor) for tensor in given.forward[:3]), given.forward[3].repeat_interleave(2)[::2])
        given.d_out = relay(given.d_out)
        assert all(torch.equal(mine, first) for mine, first in zip(by_library(given), expected, strict=True))


@pytest.mark.usefixtures("isa")
def test_keys_far_outside_the_window_or_in_other_documents_are_never_read():
    for case in (
        Case(1, 2, 1, T=50, S=500, D=16, window=20),
        Case(1, 2, 1, T=500, S=500, D=16, documents=(200, 300)),
    ):
        given = operands(case, torch.float32)
        own = slice(-50, None)
        expected = by_library(given)[0][:, :, own]
        for tensor in given.forward[1:3]:
            tensor[:, :, :96] = math.nan
        assert torch.equal(by_library(given)[0][:, :, own], expected)


@pytest.mark.usefixtures("isa")
def test_one_key_against_a_sink_weighs_exp_of_its_logit():
    # A window of one and a sink of zero make every weight exp(x) / (1 + exp(x)); the value is 1.
    logits = torch.cat((torch.linspace(-87, 20, 4001), torch.linspace(-1, 1, 4000)))
    q = torch.zeros(1, 1, len(logits), 8)
    q[..., 0] = logits
    ones = torch.ones_like(q)
    out, lse = cpu_attention.sink_attention_forward(
        q, ones, ones, torch.zeros(1), scaling=1.0, window=1, documents_BS=None
    )
    exact = torch.sigmoid(logits.double())
    # Near the result's own rounding, and that of the logit, which is multiplied by log2(e) in fp32.
    allowed = 2**-22 + logits.abs().double() * 2**-23
    assert ((out[0, 0, :, 0].double() / exact - 1).abs() <= allowed).all()
    assert (lse[0, 0].double() - torch.nn.functional.softplus(logits.double())).abs().max() <= 20 * 2**-23
    far = cpu_attention.sink_attention_forward(
        -200 * ones, ones, ones, torch.zeros(1), scaling=1.0, window=1, documents_BS=None
    )
    assert far[0].abs().max() == 0


@pytest.mark.usefixtures("isa")
def test_extreme_sinks_and_logits_stay_finite():
    given = operands(Case(1, 4, 1, T=130, S=130, D=16), torch.float32)
    q, k, v, _ = given.forward
    # No sink at all, one that hides all values, and an ordinary one; then logits up to some thousands.
    sinks = torch.tensor([-math.inf, 1e4, -1e4, 0.5])
    for factor in (1, 300):
        given.forward = (factor * q, k, v, sinks)
        for ours, truth in zip(by_library(given), by_reference(given, torch.float64), strict=True):
            assert ours.isfinite().all()
            assert (ours.double() - truth).abs().max() <= 1e-6 * factor * truth.abs().max() + 1e-30


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_autograd_gives_the_reference_gradients_whichever_implementation_runs(dtype):
    given = operands(Case(1, 4, 2, T=40, S=40, D=16, window=9, documents=(15, 25)), dtype)
    leaves = [tensor.detach().requires_grad_() for tensor in given.forward]
    out = dispatch.sink_attention(*leaves, **given.settings)
    found = [out.detach(), *torch.autograd.grad(out, leaves, given.d_out)]
    for mine, truth in zip(found, by_reference(given, torch.float64), strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), truth, atol=1e-5, rtol=0)


def test_refusals_name_what_the_library_cannot_take():
    q, k, v, sinks = operands(Case(1, 2, 1, T=5, S=5, D=16), torch.float32).forward
    assert cpu_attention.refusal(q, k, v, sinks, scaling=0.25) == ""
    assert "float64" in cpu_attention.refusal(q.double(), k.double(), v.double(), sinks, scaling=0.25)
    assert "bfloat16" in cpu_attention.refusal(q, k.bfloat16(), v, sinks, scaling=0.25)
    assert "12 is no multiple of 8" in cpu_attention.refusal(q[..., :12], k[..., :12], v[..., :12], sinks, scaling=1.0)
    assert "scaling -1.0" in cpu_attention.refusal(q, k, v, sinks, scaling=-1.0)
    assert "different devices" in cpu_attention.refusal(q, k.to("meta"), v, sinks, scaling=1.0)


@pytest.mark.usefixtures("isa")
def test_shapes_that_do_not_fit_are_errors_and_never_reach_the_library():
    q, k, v, sinks = operands(Case(1, 2, 1, T=5, S=6, D=16), torch.float32).forward
    settings = {"scaling": 1.0, "window": None, "documents_BS": None}
    forward = cpu_attention.sink_attention_forward
    for wrong in ((q, k, v[:, :, :5]), (k, q, q), (q, q.repeat(1, 2, 1, 1), q.repeat(1, 2, 1, 1)), (q, k[..., :8], v)):
        with pytest.raises(ValueError, match="are not"):
            forward(*wrong, sinks, **settings)
    with pytest.raises(ValueError, match=r"sinks \(3,\) must be \(2,\)"):
        forward(q, k, v, torch.zeros(3), **settings)
    with pytest.raises(ValueError, match=r"documents \(1, 5\) must be \(1, 6\)"):
        forward(q, k, v, sinks, **settings | {"documents_BS": torch.zeros(1, 5)})
    with pytest.raises(ValueError, match=r"a tree of \(1, 6\), \(1, 5\) must be \(1, 6\)"):
        forward(q, k, v, sinks, **settings, tree=reference.Tree(torch.zeros(1, 6), torch.zeros(1, 5)))
    with pytest.raises(ValueError, match="window 0"):
        forward(q, k, v, sinks, **settings | {"window": 0})
    out, lse = forward(q, k, v, sinks, **settings)
    with pytest.raises(ValueError, match="d_out"):
        cpu_attention.sink_attention_backward(out[:, :, 1:], q, k, v, sinks, out, lse, **settings)
