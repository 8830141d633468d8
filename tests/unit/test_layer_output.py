"""What follows attention in one kernel, against the reference and in layers against transformers' own."""

from copy import deepcopy

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from transformers import DynamicCache

from gptoss_ft.kernels import cpu_layer_output, dispatch, reference
from gptoss_ft.kernels.cases import AWKWARD, LAYER_OUTPUT, Draw
from gptoss_ft.model import few_rows
from gptoss_ft.model.few_rows import FewRowsDecoderLayer
from gptoss_ft.model.load import load_base


def call_of(dtype):
    return LAYER_OUTPUT.call(Draw(torch.device("cpu"), dtype), AWKWARD)


def with_tensor(call, position, change):
    args = list(call.args)
    args[position] = change(args[position])
    return args


@pytest.mark.parametrize("dtype", dispatch.layer_output.dtypes, ids=str)
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.usefixtures("poisoned_memory", "isa")
def test_errs_at_most_twice_as_much_as_torch(tokens, dtype, assert_as_exact_as_torch):
    call = call_of(dtype)
    args = [t[:tokens] for t in call.args[:2]] + list(call.args[2:])
    wide = [t.double() if isinstance(t, torch.Tensor) else t for t in args]
    ours, plain = (f(*args, **call.kwargs) for f in (cpu_layer_output.layer_output, reference.layer_output))
    assert_as_exact_as_torch(ours, plain, reference.layer_output(*wide, **call.kwargs))


@pytest.mark.usefixtures("isa")
def test_tokens_choose_by_their_own_logits(assert_as_exact_as_torch):
    call = call_of(torch.float32)
    torch.manual_seed(0)
    # Without the biases that keep the choice of the self-check from depending on rounding.
    args = with_tensor(call, 5, lambda router: torch.randn_like(router))
    args[6] = torch.zeros_like(args[6])
    ours, plain = (f(*args, **call.kwargs) for f in (cpu_layer_output.layer_output, reference.layer_output))
    wide = [t.double() if isinstance(t, torch.Tensor) else t for t in args]
    assert_as_exact_as_torch(ours, plain, reference.layer_output(*wide, **call.kwargs))


@pytest.mark.usefixtures("isa")
def test_threads_change_no_bit(with_threads):
    call = call_of(torch.bfloat16)
    first, *others = with_threads(lambda: cpu_layer_output.layer_output(*call.args, **call.kwargs))
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.usefixtures("isa")
def test_nan_stays_in_its_token():
    call = call_of(torch.bfloat16)
    heads = call.args[0].clone()
    heads[1, 3] = torch.nan
    out = cpu_layer_output.layer_output(heads, *call.args[1:], **call.kwargs)
    assert out[::2].isfinite().all() and out[1].isnan().all()


def test_mistakes_are_errors_and_never_reach_the_library():
    call = call_of(torch.bfloat16)
    for position in (1, 2, 3, 4, 5, 6, 8, 10):
        with pytest.raises(ValueError, match="must be"):
            cpu_layer_output.layer_output(*with_tensor(call, position, lambda t: t[..., 1:]), **call.kwargs)
    with pytest.raises(ValueError, match="7 of 6 experts"):
        cpu_layer_output.layer_output(*call.args, **call.kwargs | {"top_k": 7})


@pytest.mark.parametrize(
    ("position", "wrong", "reason"),
    [
        (0, lambda t: t.repeat(2, 1), "of 6 tokens"),
        (1, lambda t: t.float(), "the residual is"),
        (4, lambda t: t.double(), "not fp32 or bf16"),
        (5, lambda t: t.float(), "not all alike"),
        (2, lambda t: t.t().contiguous().t(), "not contiguous"),
    ],
)
def test_what_the_library_does_not_take_is_refused(position, wrong, reason):
    call = call_of(torch.bfloat16)
    assert cpu_layer_output.refusal(*call.args, **call.kwargs) == ""
    assert reason in cpu_layer_output.refusal(*with_tensor(call, position, wrong), **call.kwargs)


@pytest.fixture
def models(small_bases, monkeypatch):
    """A model in fp32, a copy whose layers are composed as by transformers, and the calls of the kernel."""
    ours = load_base(small_bases["mxfp4"], dtype=torch.float32)
    assert all(type(layer) is FewRowsDecoderLayer for layer in ours.model.layers)
    composed = deepcopy(ours)
    for layer in composed.model.layers:
        layer.register_forward_pre_hook(lambda *_: None)
        layer.mlp.register_forward_pre_hook(lambda *_: None)
    calls, kernel = [], dispatch.layer_output
    monkeypatch.setattr(few_rows, "layer_output", lambda *a, **b: calls.append(a) or kernel(*a, **b))
    return ours, composed, calls


@pytest.mark.parametrize("batch", [1, 3])
def test_steps_with_a_cache_compute_what_composed_layers_do(batch, models):
    ours, _, calls = models
    ids = torch.randint(0, 500, (batch, 14), generator=torch.Generator().manual_seed(0))
    results = []
    for model in models[:2]:
        cache, before = DynamicCache(config=model.config), len(calls)
        with torch.no_grad():
            steps = [ids[:, :11], ids[:, 11:12], ids[:, 12:13]]
            logits = [model(step, past_key_values=cache, use_cache=True).logits[:, -1] for step in steps]
        results.append(torch.stack(logits))
        # Two layers, two steps.
        assert len(calls) - before == (4 if model is ours else 0)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_hidden_states_and_router_logits_are_returned(models):
    ours, composed, _ = models
    ids = torch.tensor([[5, 7, 11]])
    with torch.no_grad():
        found, wanted = (m(ids, output_hidden_states=True, output_router_logits=True) for m in (ours, composed))
    assert len(found.hidden_states) == 3 and len(found.router_logits) == 2
    torch.testing.assert_close(found.hidden_states, wanted.hidden_states, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.router_logits, wanted.router_logits, rtol=1e-4, atol=1e-4)


def test_layers_with_a_hook_an_adapter_or_a_gradient_are_composed(models):
    ours, _, calls = models
    ids, layer = torch.tensor([[5]]), ours.model.layers[0]
    for module in (layer.mlp, layer.mlp.router, layer.mlp.experts, layer.self_attn.o_proj, layer.self_attn):
        hook = module.register_forward_pre_hook(lambda *_: None)
        with torch.no_grad():
            ours(ids)
        hook.remove()
    assert len(calls) == 5  # the other layer's
    # accelerate's hooks, as of a model that is offloaded, replace a module's forward.
    for module in (layer.mlp, layer.self_attn.q_proj, layer.post_attention_layernorm):
        told = []
        add_hook_to_module(module, told_of(told))
        with torch.no_grad():
            ours(ids)
        remove_hook_from_module(module)
        assert len(told) == 1
    assert len(calls) == 8
    ours.model.embed_tokens.weight.requires_grad_()
    ours(ids).logits.sum().backward()
    assert len(calls) == 8


def told_of(told):
    """A hook of accelerate's that notes every call."""
    hook = ModelHook()
    hook.pre_forward = lambda module, *args, **kwargs: told.append(module) or (args, kwargs)
    return hook
