"""LoRA beside a frozen linear layer: against autograd over plain torch, and what PEFT's layer still does itself."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear
from torch import nn
from torch.nn import functional as F

from gptoss_ft.adapters import linear as adapters
from gptoss_ft.adapters.linear import FrozenLinearLora
from gptoss_ft.kernels.linear import adapted_linear
from gptoss_ft.model.linear import FrozenLinear, use_frozen_linear

I, O, R, SCALING = 70, 50, 3, 1.5
NAMES = ("x", "A", "B")


def operands(dtype, factor_dtype, tokens=37):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, tokens, I), (R, I), (O, R), (O, I), (O,), (2, tokens, O)
    x, A, B, weight, bias, d_out = (torch.randn(shape, generator=generator) for shape in shapes)
    leaves = [x.to(dtype), (0.2 * A).to(factor_dtype), (0.2 * B).to(factor_dtype)]
    return leaves, weight.to(dtype), bias.to(dtype), d_out.to(dtype)


def result_and_gradients(function, leaves, d_out):
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, d_out)


@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_result_and_gradients_err_at_most_twice_as_much_as_plain_torch(
    isa, dtype, factor_dtype, poisoned_memory, assert_as_exact_as_torch
):
    leaves, weight, bias, d_out = operands(dtype, factor_dtype)

    def ours(x, A, B):
        return adapted_linear(x, weight, bias, A, B, SCALING)

    def plain(x, A, B):
        A, B = A.to(x.dtype), B.to(x.dtype)
        return F.linear(x, weight.to(x.dtype), bias.to(x.dtype)) + SCALING * F.linear(F.linear(x, A), B)

    truth = result_and_gradients(plain, [leaf.double() for leaf in leaves], d_out.double())
    computed = result_and_gradients(ours, leaves, d_out)
    for name, one, baseline, exact in zip(
        ("out", *NAMES), computed, result_and_gradients(plain, leaves, d_out), truth, strict=True
    ):
        assert_as_exact_as_torch(one, baseline, exact, name)


def test_every_number_of_threads_gives_the_same_bits(with_threads):
    leaves, weight, bias, d_out = operands(torch.bfloat16, torch.float32)

    def run():
        return result_and_gradients(lambda x, A, B: adapted_linear(x, weight, bias, A, B, SCALING), leaves, d_out)

    first, *others = with_threads(run)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("needed", range(3))
def test_what_needs_no_gradient_changes_none_of_the_others(needed):
    leaves, weight, bias, d_out = operands(torch.bfloat16, torch.float32)
    _, *all_gradients = result_and_gradients(
        lambda x, A, B: adapted_linear(x, weight, bias, A, B, SCALING), leaves, d_out
    )
    leaves = [leaf.clone().requires_grad_(i == needed) for i, leaf in enumerate(leaves)]
    (gradient,) = torch.autograd.grad(
        adapted_linear(leaves[0], weight, bias, *leaves[1:], SCALING), leaves[needed], d_out
    )
    assert torch.equal(gradient, all_gradients[needed])


def adapted(monkeypatch, **settings):
    """A model of one frozen layer with our LoRA, and how often it took our way."""
    calls = []
    monkeypatch.setattr(adapters, "adapted_linear", lambda *args: calls.append(1) or adapted_linear(*args))
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(I, O)).requires_grad_(False)
    use_frozen_linear(base)
    config = LoraConfig(r=R, lora_alpha=6, target_modules=["0"], init_lora_weights=False, **settings)
    config._register_custom_module({FrozenLinear: FrozenLinearLora})
    model = get_peft_model(base, config)
    layer = model.base_model.model[0]
    assert type(layer) is FrozenLinearLora
    return model, layer, calls


def test_it_equals_pefts_layer(monkeypatch):
    model, layer, calls = adapted(monkeypatch)
    x = torch.randn(5, I)
    torch.testing.assert_close(model(x), Linear.forward(layer, x), rtol=1e-5, atol=1e-5)
    assert calls == [1]


def test_what_is_more_than_plain_lora_is_left_to_peft(monkeypatch):
    model, layer, calls = adapted(monkeypatch, lora_dropout=0.5)
    x = torch.randn(5, I)
    model.train()
    assert not torch.equal(model(x), model(x)), "dropout"
    model.eval()
    plain = model(x)
    assert calls == [1]
    with model.disable_adapter():
        torch.testing.assert_close(model(x), F.linear(x, layer.base_layer.weight, layer.base_layer.bias))
    model.add_adapter("second", model.peft_config["default"])
    layer.set_adapter(["default", "second"])
    assert not torch.allclose(model(x), plain)
    layer.set_adapter("default")
    model.merge_adapter()
    torch.testing.assert_close(model(x), plain, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    layer.base_layer.requires_grad_(True)
    model(x).sum().backward()
    assert layer.base_layer.weight.grad is not None
    assert calls == [1]


def test_variants_of_lora_are_left_to_peft(monkeypatch):
    for settings in ({"use_dora": True}, {"lora_bias": True}):
        model, _, calls = adapted(monkeypatch, **settings)
        model(torch.randn(5, I))
        assert calls == []
