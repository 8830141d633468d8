"""RMSNorm of few rows against the reference, and layers for few rows against transformers' own."""

import pytest
import torch
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm, GptOssTopKRouter

from gptoss_ft.kernels import cpu_norm, dispatch, reference
from gptoss_ft.model.few_rows import FewRowsRMSNorm, FewRowsRouter
from gptoss_ft.model.few_rows_layer import use_few_rows_layers

EPSILON = 1e-5


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(
    "dtypes", [(x, w) for x in dispatch.rms_norm.dtypes for w in dispatch.rms_norm.dtypes], ids=str
)
# Shorter than any vector, tails of vectors, and whole ones; no row.
@pytest.mark.parametrize(("rows", "columns"), [(1, 3), (2, 40), (5, 213), (4, 2880), (0, 64)])
@pytest.mark.usefixtures("poisoned_memory", "isa")
def test_errs_at_most_twice_as_much_as_torch(rows, columns, dtypes, assert_as_exact_as_torch):
    # Rows of very different size, one of them zero, whose scale is that of epsilon.
    x = (torch.randn(rows, columns) * torch.logspace(-4, 4, rows)[:, None]).to(dtypes[0])
    x[1:2] = 0
    weight = torch.randn(columns).to(dtypes[1])
    ours, plain = cpu_norm.rms_norm(x, weight, EPSILON), reference.rms_norm(x, weight, EPSILON)
    for row in range(rows):
        truth = reference.rms_norm(x[row : row + 1].double(), weight.double(), EPSILON)
        assert_as_exact_as_torch(ours[row : row + 1], plain[row : row + 1], truth)
    assert ours.shape == x.shape


@pytest.mark.usefixtures("isa")
def test_nan_stays_in_its_row():
    x = torch.ones(2, 40, dtype=torch.bfloat16)
    x[1, 7] = torch.nan
    out = cpu_norm.rms_norm(x, torch.ones(40), EPSILON)
    assert out[0].isfinite().all() and out[1].isnan().all()


def test_mistakes_are_errors_and_never_reach_the_library():
    for weight in (torch.ones(39), torch.ones(1, 40)):
        with pytest.raises(ValueError, match="are not"):
            cpu_norm.rms_norm(torch.ones(2, 40), weight, EPSILON)


def norm():
    return GptOssRMSNorm(96, EPSILON)


def router():
    return GptOssTopKRouter(GptOssConfig(hidden_size=96, num_local_experts=8, num_experts_per_tok=3))


LAYERS = {"norm": (norm, FewRowsRMSNorm, "rms_norm"), "router": (router, FewRowsRouter, "linear")}


@pytest.fixture(params=LAYERS)
def layers(request, monkeypatch):
    """transformers' layer, ours of it, and the calls of its kernel, which is computed all the same."""
    make, kind, name = LAYERS[request.param]
    plain = make().bfloat16().requires_grad_(False).eval()
    for parameter in plain.parameters():
        parameter.normal_()
    model = torch.nn.ModuleDict({"layer": plain})
    use_few_rows_layers(model)
    ours, calls, kernel = model["layer"], [], getattr(dispatch, name)
    assert type(ours) is kind and type(plain) is not kind
    monkeypatch.setattr(f"gptoss_ft.model.few_rows.{name}", lambda *args: calls.append(args) or kernel(*args))
    return plain, ours, calls


def result(layer, x):
    """What the layer makes of rows, as one tuple."""
    found = layer(x)
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize(("rows", "few"), [(1, True), (4, True), (5, False)])
def test_the_layer_computes_what_transformers_does(rows, few, layers):
    plain, ours, calls = layers
    x = torch.randn(rows, 96).bfloat16()
    for one, other in zip(result(ours, x), result(plain, x), strict=True):
        # Two bf16 steps apart at most: sums are in another order.
        torch.testing.assert_close(one, other, rtol=2**-7, atol=2**-7)
    assert bool(calls) == few


def test_gradients_are_those_of_transformers(layers):
    plain, ours, calls = layers
    x = torch.randn(4, 96).bfloat16().requires_grad_()
    assert torch.equal(*(torch.autograd.grad(result(layer, x)[0].sum(), x)[0] for layer in (plain, ours)))
    plain.weight.requires_grad_()
    weights = (torch.autograd.grad(result(layer, x.detach())[0].sum(), layer.weight)[0] for layer in (plain, ours))
    assert torch.equal(*weights)
    assert not calls
    with torch.no_grad():
        ours(x)
    assert calls


def test_the_layer_keeps_its_parameters_and_mode(layers):
    plain, ours, _ = layers
    pairs = zip(plain.named_parameters(), ours.named_parameters(), strict=True)
    assert all(name == ours_name and parameter is own for (name, parameter), (ours_name, own) in pairs)
    assert not ours.training and ours.extra_repr() == plain.extra_repr()
