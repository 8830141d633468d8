"""Computing with merged weights: outputs and gradients are those of dense autograd through the rounded numbers."""

import pytest
import torch
from torch.nn import functional as F

from gptoss_ft.kernels import dispatch, experts, reference
from gptoss_ft.kernels.experts import ExpertProjection, expert_block
from gptoss_ft.kernels.linear import merged_linear, merged_weight
from gptoss_ft.kernels.low_rank import LowRank
from gptoss_ft.kernels.reference import MXFP4Weight, dequantize_mxfp4

T, K, E, H, I, R, S = 21, 2, 5, 64, 96, 3, 0.5
LIMITS = {"alpha": 1.702, "limit": 7.0}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def packed(O, I):
    blocks = torch.randint(0, 256, (E, O, I // 32, 16), dtype=torch.uint8)
    return MXFP4Weight(blocks, torch.randint(121, 124, (E, O, I // 32), dtype=torch.uint8))


def projection(O, I, chosen=None):
    A, B = torch.randn(E, R, I) / I**0.5, torch.randn(O, R, E).permute(2, 0, 1) / 8
    update = LowRank(A.requires_grad_(), B.requires_grad_(), S, chosen)
    return ExpertProjection(packed(O, I), torch.randn(E, O), [update], merged=True)


def straight_through(made, dtype):
    """Dense weights that have the merged numbers and the gradient of the sum."""
    (update,) = made.low_rank
    A, B = (factor.to(dtype) for factor in (update.A_ERI, update.B_EOR))
    with torch.no_grad():
        weight = dispatch.merge_mxfp4_dithered(made.weight, update.A_ERI, update.B_EOR, S, None, update.experts)
        weight = dequantize_mxfp4(*weight, dtype)
    delta = S * B @ A
    if update.experts is not None:
        delta = delta * torch.tensor([[[float(e in update.experts)]] for e in range(E)], dtype=dtype)
    return weight + (delta - delta.detach())


def dense_block(x, chosen_TK, routing, gate_up, down, dtype):
    w1, w2 = straight_through(gate_up, dtype), straight_through(down, dtype)
    out = torch.zeros_like(x)
    for t in range(T):
        for k in range(K):
            e = chosen_TK[t, k]
            h = F.linear(x[t], w1[e], gate_up.bias_EO[e].to(dtype))
            y = F.linear(reference.clamped_swiglu(h, **LIMITS), w2[e], down.bias_EO[e].to(dtype))
            out[t] = out[t] + routing[t, k] * y
    return out


@pytest.mark.parametrize("chosen", [None, frozenset({0, 2, 3})])
def test_experts_are_those_of_dense_autograd_through_the_rounding(chosen, assert_as_exact_as_torch):
    gate_up, down = projection(2 * I, H, chosen), projection(H, I, chosen)
    factors = [f for made in (gate_up, down) for update in made.low_rank for f in (update.A_ERI, update.B_EOR)]
    x, routing, d_out = torch.randn(T, H), torch.rand(T, K), torch.randn(T, H)
    # One expert gets no token.
    experts_TK = torch.stack([torch.randperm(E - 1)[:K] for _ in range(T)])

    def results(block, dtype):
        a, b = (value.to(dtype).requires_grad_() for value in (x, routing))
        out = block(a, b, dtype)
        gradients = torch.autograd.grad(out, (a, b, *factors), d_out.to(dtype))
        return [out.detach(), *gradients]

    def ours(a, b, dtype):
        return expert_block(a, experts_TK, b, gate_up, down, **LIMITS)

    def dense(a, b, dtype):
        return dense_block(a, experts_TK, b, gate_up, down, dtype)

    names = ("out", "dx", "d_routing", "dA_gate_up", "dB_gate_up", "dA_down", "dB_down")
    dtypes = ((ours, torch.float32), (dense, torch.float32), (dense, torch.float64))
    for name, *values in zip(names, *(results(*way) for way in dtypes), strict=True):
        assert_as_exact_as_torch(*values, name)
    merged = expert_block(x, experts_TK, routing, gate_up, down, **LIMITS)
    beside = [ExpertProjection(made.weight, made.bias_EO, made.low_rank) for made in (gate_up, down)]
    assert (merged - expert_block(x, experts_TK, routing, *beside, **LIMITS)).abs().max() > 1e-2


def test_the_backward_pass_multiplies_the_bytes_of_the_forward_pass(monkeypatch):
    gate_up, down = projection(2 * I, H), projection(H, I)
    seen = {"forward": [], "backward": []}

    def noting(pass_, function, weight_at):
        def run(*args):
            seen[pass_].append(args[weight_at])
            return function(*args)

        return run

    linear, linear_dx = experts.dispatch.grouped_linear, experts.dispatch.grouped_linear_dx
    monkeypatch.setattr(experts.dispatch, "grouped_linear", noting("forward", linear, 1))
    monkeypatch.setattr(experts.dispatch, "grouped_linear_dx", noting("backward", linear_dx, 1))
    x = torch.randn(T, H, requires_grad=True)
    experts_TK = torch.stack([torch.randperm(E)[:K] for _ in range(T)])
    expert_block(x, experts_TK, torch.rand(T, K), gate_up, down, **LIMITS).sum().backward()
    for forward, backward in zip(seen["forward"], reversed(seen["backward"]), strict=True):
        assert all(map(torch.equal, forward, backward))
    (update,) = gate_up.low_rank
    merged = dispatch.merge_mxfp4_dithered(gate_up.weight, update.A_ERI.detach(), update.B_EOR.detach(), S)
    assert all(map(torch.equal, seen["forward"][0], merged))


def test_merging_takes_one_update_and_packed_weights():
    update = projection(64, 64).low_rank[0]
    with pytest.raises(ValueError, match="not 2"):
        ExpertProjection(packed(64, 64), torch.zeros(E, 64), [update, update], merged=True)
    with pytest.raises(ValueError, match="dense"):
        ExpertProjection(torch.zeros(E, 64, 64), torch.zeros(E, 64), [update], merged=True)


def test_linear_layers_are_those_of_dense_autograd_through_the_rounding(assert_as_exact_as_torch):
    weight, bias = torch.randn(37, 50).bfloat16().float(), torch.randn(37)
    A, B = torch.randn(R, 50), torch.randn(37, R)
    x, dy = torch.randn(2, 9, 50), torch.randn(2, 9, 37)
    rounded = dispatch.merge_bf16(weight, A, B, S)

    def dense(dtype):
        leaves = [value.to(dtype).requires_grad_() for value in (x, A, B)]
        delta = S * leaves[2] @ leaves[1]
        y = F.linear(leaves[0], rounded.to(dtype) + (delta - delta.detach()), bias.to(dtype))
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))]

    def ours(function):
        leaves = [value.clone().requires_grad_() for value in (x, A, B)]
        y = function(leaves[0], *leaves[1:])
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    for function in (
        lambda x, A, B: merged_linear(x, weight, bias, A, B, S),
        lambda x, A, B: F.linear(x, merged_weight(weight, A, B, S), bias),
    ):
        compared = zip(("y", "dx", "dA", "dB"), ours(function), dense(torch.float32), dense(torch.float64), strict=True)
        for name, *values in compared:
            assert_as_exact_as_torch(*values, name)


@pytest.mark.parametrize("needed", ["x", "A", "B"])
def test_only_gradients_that_are_needed_are_computed(needed, monkeypatch):
    leaves = {"x": torch.randn(9, 50), "A": torch.randn(R, 50), "B": torch.randn(37, R)}
    weight, dy = torch.randn(37, 50).bfloat16().float(), torch.randn(9, 37)

    def gradients(names):
        mine = {name: leaf.clone().requires_grad_(name in names) for name, leaf in leaves.items()}
        y = merged_linear(mine["x"], weight, None, mine["A"], mine["B"], S)
        return dict(zip(names, torch.autograd.grad(y, [mine[name] for name in names], dy), strict=True))

    wanted = gradients("xAB")[needed]
    computed = []
    for name in ("linear_dx", "low_rank_gradient_"):
        function = getattr(dispatch, name)
        monkeypatch.setattr(
            dispatch, name, lambda *args, name=name, function=function: computed.append(name) or function(*args)
        )
    assert torch.equal(gradients(needed)[needed], wanted)
    assert computed == ["linear_dx" if needed == "x" else "low_rank_gradient_"]
