"""The compiled cross entropy against torch's in fp64."""

import pytest
import torch
from torch.nn import functional as F

from gptoss_ft.kernels import cpu_library, cpu_loss, reference

pytestmark = pytest.mark.skipif(cpu_library.library() is None, reason="the CPU library was not built")


def exact(logits, targets, weights):
    logits = logits.double().requires_grad_()
    losses = F.cross_entropy(logits, targets, reduction="none")
    return losses.detach(), torch.autograd.grad((losses * weights.double()).sum(), logits)[0]


@pytest.mark.parametrize("vocabulary", [1, 3, 16, 77, 1003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_losses_and_gradient_are_within_twice_the_error_of_torch(isa, vocabulary, dtype, spread):
    torch.manual_seed(vocabulary)
    logits = (torch.randn(9, vocabulary) * spread).to(dtype)
    targets, weights = torch.randint(0, vocabulary, (9,)), torch.rand(9)
    truth = exact(logits, targets, weights)
    budget = reference.cross_entropy(logits, targets, weights)
    got = cpu_loss.cross_entropy(logits.clone(), targets, weights)
    for mine, theirs, expected in zip(got, budget, truth, strict=True):
        # fp32 rounds a loss that is exactly zero to about its epsilon.
        assert (mine.double() - expected).norm() <= 2 * (theirs.double() - expected).norm() + 1e-6 * (
            1 + expected.norm()
        )


def test_probabilities_that_vanish_and_rows_without_weight(isa):
    logits = torch.tensor([[0.0, -200.0, 100.0], [-1e30, 0.0, -torch.inf], [1.0, 2.0, 3.0]])
    targets, weights = torch.tensor([2, 1, 0]), torch.tensor([1.0, 2.0, 0.0])
    losses, gradient = cpu_loss.cross_entropy(logits.clone(), targets, weights)
    torch.testing.assert_close(losses, F.cross_entropy(logits, targets, reduction="none"))
    torch.testing.assert_close(gradient, torch.zeros(3, 3))


def test_logits_that_are_no_numbers_show_in_loss_and_gradient(isa):
    losses, gradient = cpu_loss.cross_entropy(torch.full((1, 40), torch.nan), torch.tensor([5]), torch.ones(1))
    assert losses.isnan().all() and gradient.isnan().all()


def test_no_number_of_threads_changes_a_bit(isa):
    logits, targets, weights = torch.randn(33, 501), torch.randint(0, 501, (33,)), torch.rand(33)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(cpu_loss.cross_entropy(logits.clone(), targets, weights))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_mistakes_leave_the_logits_alone():
    logits = torch.randn(2, 5)
    kept = logits.clone()
    for targets, weights in (([0, 5], [1.0, 1.0]), ([-1, 0], [1.0, 1.0]), ([0, 1], [1.0])):
        with pytest.raises(ValueError, match="targets"):
            cpu_loss.cross_entropy(logits, torch.tensor(targets), torch.tensor(weights))
    assert torch.equal(logits, kept)
