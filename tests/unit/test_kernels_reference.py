"""The reference kernels against dense autograd in fp64 and against torch's own operations."""

import pytest
import torch
from torch.nn import functional as F

from gptoss_ft.kernels import reference
from gptoss_ft.kernels.experts import ExpertProjection, expert_block
from gptoss_ft.kernels.low_rank import LowRank
from gptoss_ft.kernels.reference import MXFP4Weight

E, H, I, R, T, K = 5, 64, 96, 4, 11, 2


def random_packed(num_experts, num_out, num_in, generator):
    blocks = torch.randint(0, 256, (num_experts, num_out, num_in // 32, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(118, 125, (num_experts, num_out, num_in // 32), generator=generator, dtype=torch.uint8)
    return MXFP4Weight(blocks, scales)


def dense(weight, dtype=torch.float64):
    """Decoded by the definition of the format, one element at a time."""
    blocks, scales = weight
    out = torch.empty(*blocks.shape[:-1], 32, dtype=dtype)
    magnitudes = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    flat_out, flat_blocks, flat_scales = out.view(-1, 32), blocks.reshape(-1, 16), scales.reshape(-1)
    for block in range(len(flat_out)):
        for position in range(32):
            code = int(flat_blocks[block, position // 2]) >> (4 * (position % 2)) & 0xF
            sign = -1 if code & 8 else 1
            flat_out[block, position] = sign * magnitudes[code & 7] * 2.0 ** (int(flat_scales[block]) - 127)
    return out.flatten(-2)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def layer(generator):
    gate_up, down = random_packed(E, 2 * I, H, generator), random_packed(E, H, I, generator)
    biases = [torch.randn(E, n, generator=generator, dtype=torch.float64) for n in (2 * I, H)]
    shapes = ((E, R, H), (E, 2 * I, R), (E, R, I), (E, H, R))
    factors = [0.2 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    hidden = torch.randn(T, H, generator=generator, dtype=torch.float64)
    # Expert 3 is never chosen.
    experts = torch.stack([torch.tensor([0, 1, 2, 4])[torch.randperm(4, generator=generator)[:K]] for _ in range(T)])
    routing = torch.rand(T, K, generator=generator, dtype=torch.float64).softmax(-1)
    return gate_up, down, biases, factors, hidden, experts, routing


def by_definition(hidden, experts, routing, gate_up_EOI, down_EOI, biases):
    """Token by token, straight from the model's formula."""
    rows = []
    for t in range(len(hidden)):
        row = torch.zeros(H, dtype=hidden.dtype)
        for k in range(experts.shape[1]):
            e = experts[t, k]
            h = gate_up_EOI[e] @ hidden[t] + biases[0][e]
            gate, up = h[0::2].clamp(max=7.0), h[1::2].clamp(-7.0, 7.0)
            act = (up + 1) * gate * torch.sigmoid(1.702 * gate)
            row = row + routing[t, k] * (down_EOI[e] @ act + biases[1][e])
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("packed", [True, False])
def test_expert_block_and_its_gradients_equal_dense_autograd(layer, packed):
    gate_up, down, biases, factors, hidden, experts, routing = layer
    scaling = 1.5
    W_gu, W_d = dense(gate_up), dense(down)

    leaves = [t.clone().requires_grad_() for t in (hidden, routing, *factors)]
    h, w, A1, B1, A2, B2 = leaves
    truth = by_definition(h, experts, w, W_gu + scaling * B1 @ A1, W_d + scaling * B2 @ A2, biases)
    upstream = torch.randn(T, H, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad((truth * upstream).sum(), leaves)

    h, w, A1, B1, A2, B2 = leaves = [t.clone().requires_grad_() for t in (hidden, routing, *factors)]
    weights = (gate_up, down) if packed else (W_gu.mT.contiguous(), W_d.mT.contiguous())
    out = expert_block(
        h,
        experts,
        w,
        ExpertProjection(weights[0], biases[0], [LowRank(A1, B1, scaling)]),
        ExpertProjection(weights[1], biases[1], [LowRank(A2, B2, scaling)]),
        alpha=1.702,
        limit=7.0,
    )
    got = torch.autograd.grad((out * upstream).sum(), leaves)

    torch.testing.assert_close(out, truth, rtol=1e-12, atol=1e-12)
    for name, one, other in zip(("hidden", "routing", "A1", "B1", "A2", "B2"), got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")
        assert one.abs().sum() > 0
    assert not got[2][3].any(), "an expert without tokens has no gradient"


def test_lora_limited_to_some_experts_leaves_the_others_alone(layer):
    gate_up, down, biases, (A1, B1, _, _), hidden, experts, routing = layer
    A1.requires_grad_()
    only = LowRank(A1, B1, 1.0, frozenset({1}))
    kwargs = {"alpha": 1.702, "limit": 7.0}
    plain = ExpertProjection(down, biases[1])
    out = expert_block(hidden, experts, routing, ExpertProjection(gate_up, biases[0], [only]), plain, **kwargs)
    base = expert_block(hidden, experts, routing, ExpertProjection(gate_up, biases[0]), plain, **kwargs)
    touched = (experts == 1).any(-1)
    assert (out != base).any(-1).tolist() == touched.tolist()
    (grad,) = torch.autograd.grad(out.sum(), A1)
    assert grad[1].any() and not grad[[0, 2, 3, 4]].any()


def test_packed_expert_biases_refuse_to_be_trained(layer):
    gate_up, down, biases, _, hidden, experts, routing = layer
    trained = ExpertProjection(gate_up, biases[0].requires_grad_())
    with pytest.raises(ValueError, match="biases cannot be trained"):
        expert_block(hidden, experts, routing, trained, ExpertProjection(down, biases[1]), alpha=1.702, limit=7.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dequantize_gives_every_code_at_every_scale(dtype):
    blocks = (torch.arange(16) | torch.arange(16).flip(0) << 4).to(torch.uint8).expand(1, 255, 16)
    scales = torch.arange(255, dtype=torch.uint8)[None]
    with torch.no_grad():
        got = reference.dequantize_mxfp4(blocks, scales, dtype)
    expected = dense(MXFP4Weight(blocks[:, :, None], scales[..., None])).to(dtype).flatten(-2).view_as(got)
    assert torch.equal(got, expected)


def test_scale_255_is_nan():
    blocks, scales = torch.zeros(1, 2, 16, dtype=torch.uint8), torch.tensor([[255, 127]], dtype=torch.uint8)
    values = reference.dequantize_mxfp4(blocks, scales, torch.bfloat16)
    assert values[0, :32].isnan().all() and not values[0, 32:].isnan().any()


def test_scales_that_do_not_fit_the_blocks_are_refused():
    with pytest.raises(ValueError, match="do not go with"):
        reference.dequantize_mxfp4(
            torch.zeros(2, 3, 16, dtype=torch.uint8), torch.zeros(2, 1, dtype=torch.uint8), torch.float32
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cross_entropy_equals_torch(dtype, generator):
    logits = torch.randn(20, 50, generator=generator, dtype=dtype, requires_grad=True)
    targets, weights = (
        torch.randint(0, 50, (20,), generator=generator),
        torch.rand(20, generator=generator, dtype=dtype),
    )
    truth = F.cross_entropy(logits, targets, reduction="none")
    (expected,) = torch.autograd.grad((truth * weights).sum(), logits)
    losses, gradient = reference.cross_entropy(logits.detach(), targets, weights)
    torch.testing.assert_close(losses, truth.detach())
    torch.testing.assert_close(gradient, expected)
