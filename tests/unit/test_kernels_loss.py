"""The chunked loss and the frozen linear layer against torch's own, in fp64 and within twice its error in bf16."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gptoss_ft.kernels.linear import frozen_linear
from gptoss_ft.kernels.loss import chunked_cross_entropy
from gptoss_ft.model.linear import FrozenLinear, use_frozen_linear


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("chunk_size", [1, 7, 64])
def test_chunked_cross_entropy_equals_torch(chunk_size, generator):
    hidden = torch.randn(20, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    head = torch.randn(50, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 50, (20,), generator=generator)
    truth = F.cross_entropy(hidden @ head.T, targets, reduction="sum")
    expected = torch.autograd.grad(3 * truth, (hidden, head))
    loss = chunked_cross_entropy(hidden, head, targets, chunk_size=chunk_size)
    got = torch.autograd.grad(3 * loss, (hidden, head))
    torch.testing.assert_close(loss, truth)
    torch.testing.assert_close(got, expected)


def test_chunked_cross_entropy_in_bf16_is_within_twice_the_error_of_plain_torch(generator):
    hidden, head = torch.randn(64, 128, generator=generator), torch.randn(4096, 128, generator=generator) * 0.3
    targets = torch.randint(0, 4096, (64,), generator=generator)

    def loss_and_gradient(function, dtype):
        h = hidden.to(dtype).requires_grad_()
        loss = function(h, head.to(dtype))
        return loss.double(), torch.autograd.grad(loss, h)[0].double()

    def plain(h, w):
        return F.cross_entropy((h @ w.T).to(torch.promote_types(h.dtype, torch.float32)), targets, reduction="sum")

    def chunked(h, w):
        return chunked_cross_entropy(h, w, targets, chunk_size=16)

    exact = loss_and_gradient(plain, torch.float64)
    budget = loss_and_gradient(plain, torch.bfloat16)
    got = loss_and_gradient(chunked, torch.bfloat16)
    for mine, theirs, truth in zip(got, budget, exact, strict=True):
        assert (mine - truth).norm() <= 2 * (theirs - truth).norm()


def test_chunked_cross_entropy_without_targets_is_zero():
    hidden = torch.zeros(0, 8, requires_grad=True)
    loss = chunked_cross_entropy(hidden, torch.zeros(50, 8), torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert float(loss.detach()) == 0


def test_weights_scale_each_rows_part_of_loss_and_gradient(generator):
    hidden = torch.randn(20, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    head = torch.randn(50, 8, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 50, (20,), generator=generator)
    weights = torch.rand(20, generator=generator, dtype=torch.float64)
    truth = (F.cross_entropy(hidden @ head.T, targets, reduction="none") * weights).sum()
    loss = chunked_cross_entropy(hidden, head, targets, weights, 7)
    torch.testing.assert_close(loss, truth)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden), torch.autograd.grad(truth, hidden))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_frozen_linear_layer_is_a_linear_layer(dtype, bias, generator):
    plain = nn.Linear(72, 40, bias=bias).requires_grad_(False)
    x = torch.randn(3, 5, 72, generator=generator)
    dy = torch.randn(3, 5, 40, generator=generator)

    def run(layer, dtype):
        layer = layer.to(dtype)
        leaf = x.to(dtype).requires_grad_()
        y = layer(leaf)
        return y.detach().double(), torch.autograd.grad(y, leaf, dy.to(dtype))[0].double()

    got = run(FrozenLinear.of(plain), dtype)
    for mine, theirs, truth in zip(got, run(plain, dtype), run(plain, torch.float64), strict=True):
        assert (mine - truth).norm() <= 2 * (theirs - truth).norm()


def test_a_layer_that_learns_is_left_to_torch(generator):
    layer = FrozenLinear.of(nn.Linear(8, 4))
    layer(torch.randn(2, 8, generator=generator)).sum().backward()
    assert layer.weight.grad is not None and layer.bias.grad is not None


def test_only_the_input_of_frozen_linear_has_a_gradient():
    weight = torch.ones(4, 8)
    x = torch.ones(2, 8, requires_grad=True)
    frozen_linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, torch.full((2, 8), 4.0))


def test_layers_are_replaced_in_place_and_share_their_parameters():
    model = nn.Sequential(nn.Linear(4, 4), nn.ModuleDict({"inner": nn.Linear(4, 2, bias=False)}))
    before = dict(model.named_parameters())
    use_frozen_linear(model)
    assert type(model[0]) is type(model[1]["inner"]) is FrozenLinear
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == {n: p.data_ptr() for n, p in before.items()}
