"""The expert block of a few tokens in one call, against the operations that it is made of."""

from itertools import accumulate

import pytest
import torch

from gptoss_ft.kernels import cpu_experts, cpu_gemm, cpu_library, cpu_mixture, dispatch, reference
from gptoss_ft.kernels.cases import Draw
from gptoss_ft.kernels.experts import ExpertProjection, LowRank, expert_block

pytestmark = pytest.mark.skipif(cpu_library.library() is None, reason="the CPU library was not built: no C++ compiler")

E = 5
CONSTANTS = {"alpha": 1.702, "limit": 2.0}
# Experts of each token: one row; four experts; shared by several tokens, one chosen twice; more rows than few for one.
CHOICES = {
    "one row": [[3]],
    "one token": [[4, 0, 3, 1]],
    "four tokens": [[4, 0, 3, 1], [1, 0, 4, 2], [0, 0, 1, 2], [3, 2, 1, 0]],
    "one expert": [[2, 2]] * 4,
}
# Hidden and intermediate features: one block each; an odd number of blocks and strips with a tail.
SIZES = [(32, 32), (288, 96), (160, 352)]


def operands(choices, size, dtype, bias_dtype=None):
    (H, I), draw, experts_TK = size, Draw(torch.device("cpu"), dtype), torch.tensor(choices)
    weights_TK = draw.normal(*experts_TK.shape).softmax(-1)
    biases = (draw.normal(E, 2 * I), draw.normal(E, H))
    gate_up_bias, down_bias = (bias.to(bias_dtype or dtype) for bias in biases)
    hidden_TH, gate_up, down = draw.normal(len(choices), H), draw.packed(E, 2 * I, H), draw.packed(E, H, I)
    return hidden_TH, experts_TK, weights_TK, gate_up, gate_up_bias, down, down_bias


def in_fp64(operands):
    return [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in operands]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
@pytest.mark.usefixtures("poisoned_memory", "isa")
def test_errs_at_most_twice_as_much_as_torch(choices, size, dtype, assert_as_exact_as_torch):
    given = operands(choices, size, dtype)
    ours, plain = (function(*given, **CONSTANTS) for function in (cpu_mixture.expert_mixture, reference.expert_mixture))
    assert_as_exact_as_torch(ours, plain, reference.expert_mixture(*in_fp64(given), **CONSTANTS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
@pytest.mark.usefixtures("isa")
def test_has_the_bits_of_separate_operations_for_every_number_of_threads(choices, dtype, with_threads):
    given = operands(choices, (160, 352), dtype)
    hidden_TH, experts_TK, weights_TK, gate_up, gate_up_bias, down, down_bias = given
    # One row at a time, as it is with few rows an expert whatever their number.
    rows = [(hidden_TH[t : t + 1], e) for t, experts in enumerate(choices) for e in experts]
    parts = []
    for x, e in rows:
        ends = list(accumulate(int(other == e) for other in range(E)))
        pairs = cpu_gemm.grouped_linear(x, gate_up, gate_up_bias, ends)
        parts.append(cpu_gemm.grouped_linear(cpu_experts.clamped_swiglu(pairs, **CONSTANTS), down, down_bias, ends))
    slots_TK = torch.arange(len(rows)).view_as(experts_TK)
    separate = cpu_experts.combine(torch.cat(parts), slots_TK, weights_TK)
    for ours in with_threads(lambda: cpu_mixture.expert_mixture(*given, **CONSTANTS)):
        assert torch.equal(ours, separate)


@pytest.mark.usefixtures("isa")
def test_biases_may_have_a_dtype_of_their_own(assert_as_exact_as_torch):
    given = operands(CHOICES["one token"], (160, 352), torch.bfloat16, bias_dtype=torch.float32)
    ours, plain = (function(*given, **CONSTANTS) for function in (cpu_mixture.expert_mixture, reference.expert_mixture))
    assert_as_exact_as_torch(ours, plain, reference.expert_mixture(*in_fp64(given), **CONSTANTS))


@pytest.fixture
def mixtures(monkeypatch):
    """The calls of `dispatch.expert_mixture`, which is computed all the same."""
    calls, mixture = [], dispatch.expert_mixture
    monkeypatch.setattr(
        dispatch, "expert_mixture", lambda *args, **kwargs: calls.append(args) or mixture(*args, **kwargs)
    )
    return calls


def block(given, *, tokens=None, low_rank=(), requires_grad=False):
    hidden_TH, experts_TK, weights_TK, gate_up, gate_up_bias, down, down_bias = given
    if tokens:
        hidden_TH, experts_TK, weights_TK = (t.expand(tokens, -1) for t in (hidden_TH, experts_TK, weights_TK))
    hidden_TH = hidden_TH.clone().requires_grad_(requires_grad)
    projections = ExpertProjection(gate_up, gate_up_bias, low_rank), ExpertProjection(down, down_bias)
    return expert_block(hidden_TH, experts_TK, weights_TK, *projections, **CONSTANTS)


def test_the_block_takes_this_path_for_few_tokens_only_and_with_the_same_bits(mixtures):
    given = operands(CHOICES["one token"], (288, 96), torch.bfloat16)
    few = block(given)
    assert len(mixtures) == 1
    # Products of few rows have one order of additions, with a gradient and without.
    assert torch.equal(few, block(given, requires_grad=True).detach())
    assert len(mixtures) == 1
    with torch.no_grad():
        assert torch.equal(few, block(given, requires_grad=True))
    assert len(mixtures) == 2
    many = block(given, tokens=5)
    assert len(mixtures) == 2
    torch.testing.assert_close(many, few.expand(5, -1), rtol=0.02, atol=0.02 * float(few.abs().max()))


def test_the_block_does_not_take_this_path_with_an_adapter(mixtures):
    given = operands(CHOICES["one token"], (288, 96), torch.bfloat16)
    A, B = torch.ones(E, 3, 288, dtype=torch.bfloat16), torch.ones(E, 192, 3, dtype=torch.bfloat16)
    assert not torch.equal(block(given, low_rank=[LowRank(A, B, 1.0)]), block(given))
    assert len(mixtures) == 1


def test_mistakes_are_errors_and_never_reach_the_library():
    hidden_TH, experts_TK, weights_TK, *projections = operands(CHOICES["one token"], (288, 96), torch.bfloat16)
    cut = projections[1][:, 1:]
    for wrong in (
        (hidden_TH, experts_TK + 1, weights_TK, *projections),
        (hidden_TH, experts_TK - 1, weights_TK, *projections),
        (hidden_TH, experts_TK[:, :3], weights_TK, *projections),
        (hidden_TH[:, 32:], experts_TK, weights_TK, *projections),
        (hidden_TH, experts_TK, weights_TK, projections[0], cut, *projections[2:]),
    ):
        with pytest.raises(ValueError, match="must be"):
            cpu_mixture.expert_mixture(*wrong, **CONSTANTS)


def test_what_the_library_does_not_take_is_refused_with_its_reason():
    given = operands([[0, 1, 2, 3]] * 5, (32, 32), torch.bfloat16)
    assert "4 choices of 5 tokens" in cpu_mixture.refusal(*given)
    mixed = (*given[:6], given[6].float())
    mixed = (mixed[0][:1], mixed[1][:1], mixed[2][:1], *mixed[3:])
    assert "biases" in cpu_mixture.refusal(*mixed)
