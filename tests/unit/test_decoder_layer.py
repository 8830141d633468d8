"""A whole layer in one kernel, against the reference, and in models against layers composed of other kernels."""

import gc
import weakref
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from transformers import DynamicCache, StaticCache

from gptoss_ft.kernels import cpu_decoder_layer, dispatch, reference, selfcheck
from gptoss_ft.kernels.cases import AWKWARD, DECODER_LAYER, Draw
from gptoss_ft.model import few_rows, pending
from gptoss_ft.model.few_rows_layer import FewRowsDecoderLayer
from gptoss_ft.model.load import load_base

SIZE = replace(AWKWARD, inputs=96)


def call_of(dtype):
    return DECODER_LAYER.call(Draw(torch.device("cpu"), dtype), SIZE)


def results(args):
    """Output, keys and values of the kernel, of the reference, and of the reference in fp64."""
    found = []
    for function, of in (
        (cpu_decoder_layer.decoder_layer, args),
        (reference.decoder_layer, args),
        (reference.decoder_layer, selfcheck._in_fp64(call_of(torch.float32)._replace(args=tuple(args))).args),
    ):
        # Copies, in the same layout, because keys and values are written.
        hidden, keys, values, *rest = of
        keys, values = (torch.empty_like(t).copy_(t) for t in (keys, values))
        found.append((function(hidden, keys, values, *rest), keys, values))
    return found


def with_weights(args, **changes):
    return [*args[:5], replace(args[5], **changes), *args[6:]]


@pytest.mark.parametrize("dtype", dispatch.decoder_layer.dtypes, ids=str)
# One token, some of one row, and one each of several rows.
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (3, 1)], ids=str)
@pytest.mark.usefixtures("poisoned_memory", "isa")
def test_errs_at_most_twice_as_much_as_torch(shape, dtype, assert_as_exact_as_torch):
    args = list(call_of(dtype).args)
    (B, T), draw = shape, Draw(torch.device("cpu"), dtype)
    K, D, S = args[1].shape[1], args[1].shape[3], 75
    # Keys with room behind them; the same rotation in all rows; padding before the first of several rows.
    states = [draw.normal(B, K, S + 7, D)[:, :, :S] for _ in range(2)]
    documents = torch.zeros(B, S, dtype=torch.int32)
    documents[0, :70] = -1
    args = [draw.normal(B, T, 96), *states, *(t[:, :T] for t in args[3:5]), args[5]]
    for extra in ([], [documents]):
        for name, *tensors in zip(("out", "keys", "values"), *results(args + extra), strict=True):
            assert_as_exact_as_torch(*tensors, name)


@pytest.mark.usefixtures("isa")
def test_the_rotation_may_be_of_every_row(assert_as_exact_as_torch):
    args, draw = list(call_of(torch.float32).args), Draw(torch.device("cpu"), torch.float32)
    angles = draw.normal(2, 2, args[3].shape[2])
    states = [draw.normal(2, *args[1].shape[1:]) for _ in range(2)]
    args = [draw.normal(2, 2, 96), *states, angles.cos(), angles.sin(), args[5]]
    for tensors in zip(*results(with_weights(args, window=None)), strict=True):
        assert_as_exact_as_torch(*tensors)


@pytest.mark.usefixtures("isa")
def test_only_the_last_positions_are_written():
    hidden, keys, values, *rest = call_of(torch.bfloat16).args
    before = keys.clone(), values.clone()
    cpu_decoder_layer.decoder_layer(hidden, keys, values, *rest)
    for now, then in zip((keys, values), before, strict=True):
        assert torch.equal(now[:, :, :-3], then[:, :, :-3])
        assert (now[:, :, -3:] != then[:, :, -3:]).any()


@pytest.mark.usefixtures("isa")
def test_tokens_choose_by_their_own_logits(assert_as_exact_as_torch):
    args = list(call_of(torch.float32).args)
    torch.manual_seed(0)
    # Without the biases that keep the choice of the self-check from depending on rounding.
    router = torch.randn_like(args[5].router_EH)
    args = with_weights(args, router_EH=router, router_bias_E=torch.zeros(len(router)))
    for tensors in zip(*results(args), strict=True):
        assert_as_exact_as_torch(*tensors)


@pytest.mark.usefixtures("isa")
def test_threads_change_no_bit(with_threads):
    args = call_of(torch.bfloat16).args
    first, *others = with_threads(lambda: cpu_decoder_layer.decoder_layer(*args))
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.usefixtures("isa")
def test_nan_stays_in_its_row():
    args, draw = call_of(torch.bfloat16).args, Draw(torch.device("cpu"), torch.bfloat16)
    hidden, states = draw.normal(3, 1, 96), [draw.normal(3, *args[1].shape[1:]) for _ in range(2)]
    hidden[1, 0, 3] = torch.nan
    out = cpu_decoder_layer.decoder_layer(hidden, *states, *(t[:, :1] for t in args[3:5]), args[5])
    assert out[::2].isfinite().all() and out[1].isnan().all()


def test_mistakes_are_errors_and_never_reach_the_library():
    args = list(call_of(torch.bfloat16).args)
    for position in (0, 1, 2, 3, 4):
        wrong = [t[..., 2:] if i == position else t for i, t in enumerate(args)]
        with pytest.raises(ValueError, match="must be"):
            cpu_decoder_layer.decoder_layer(*wrong)
    with pytest.raises(ValueError, match="must be"):
        cpu_decoder_layer.decoder_layer(args[0], *(t[:, :, :2] for t in args[1:3]), *args[3:])
    with pytest.raises(ValueError, match="documents"):
        cpu_decoder_layer.decoder_layer(*args, torch.zeros(1, 74, dtype=torch.int32))
    names = [name for name, value in vars(args[5]).items() if isinstance(value, torch.Tensor)]
    for name in names:
        with pytest.raises(ValueError, match="must be"):
            cpu_decoder_layer.decoder_layer(*with_weights(args, **{name: getattr(args[5], name)[1:]}))
    for constant in ({"top_k": 4}, {"window": 0}, {"head_dim": 80}):
        with pytest.raises(ValueError, match=r"cannot be chosen|must be"):
            cpu_decoder_layer.decoder_layer(*with_weights(args, **constant))


@pytest.mark.parametrize(
    ("position", "wrong", "reason"),
    [
        (0, lambda t: t.repeat(2, 1, 1), "of 6 tokens"),
        (0, lambda t: t.float(), "not in the dtype of the rows"),
        (3, lambda t: t.float(), "not in the dtype of the rows"),
        (2, lambda t: t.mT.contiguous().mT, "not contiguous along a head"),
        ("norm_H", lambda t: t.double(), "not all alike"),
        ("router_EH", lambda t: t.float(), "not all alike"),
        ("sinks_N", lambda t: t.double(), "not fp32 or bf16"),
        ("key_OH", lambda t: t.t().contiguous().t(), "not contiguous"),
        ("scaling", lambda t: 0.0, "not above zero"),
    ],
)
def test_what_the_library_does_not_take_is_refused(position, wrong, reason):
    args = list(call_of(torch.bfloat16).args)
    assert cpu_decoder_layer.refusal(*args) == ""
    if isinstance(position, str):
        args = with_weights(args, **{position: wrong(getattr(args[5], position))})
    else:
        args[position] = wrong(args[position])
    assert reason in cpu_decoder_layer.refusal(*args)


@pytest.fixture
def models(small_bases, monkeypatch):
    """A model in fp32, a copy whose layers are composed as by transformers, and the calls of the kernel."""
    ours = load_base(small_bases["mxfp4"], dtype=torch.float32)
    assert all(type(layer) is FewRowsDecoderLayer for layer in ours.model.layers)
    composed = deepcopy(ours)
    for layer in composed.model.layers:
        layer.register_forward_pre_hook(lambda *_: None)
        layer.mlp.register_forward_pre_hook(lambda *_: None)
    calls, take_step = [], FewRowsDecoderLayer._step

    def counted(self, *args):
        out = take_step(self, *args)
        calls.extend([self] * (out is not None))
        return out

    monkeypatch.setattr(FewRowsDecoderLayer, "_step", counted)
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
    ours, composed, calls = models
    ids = torch.tensor([[5, 7, 11]])
    with torch.no_grad():
        found, wanted = (m(ids, output_hidden_states=True, output_router_logits=True) for m in (ours, composed))
    assert len(found.hidden_states) == 3 and len(found.router_logits) == 2
    torch.testing.assert_close(found.hidden_states, wanted.hidden_states, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.router_logits, wanted.router_logits, rtol=1e-4, atol=1e-4)
    assert not calls
    # transformers' hooks are still there, but record nothing any more.
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, found.logits, rtol=1e-4, atol=1e-4)
    assert len(calls) == 2


def test_parameters_that_changed_are_noticed(models):
    ours, composed, calls = models
    ids = torch.tensor([[5, 7, 11]])
    with torch.no_grad():
        before = ours(ids).logits
        for model in (ours, composed):
            attention, experts = model.model.layers[0].self_attn, model.model.layers[1].mlp.experts
            attention.o_proj.weight.data = 3 * attention.o_proj.weight
            experts.down_proj_bias = torch.nn.Parameter(experts.down_proj_bias + 1, requires_grad=False)
            attention.sinks += 1
            model.model.layers[1].mlp.router.top_k = 1
        after, wanted = (model(ids).logits for model in (ours, composed))
    assert len(calls) == 4 and (after - before).abs().max() > 0.1
    torch.testing.assert_close(after, wanted, rtol=1e-4, atol=1e-4)


def test_without_the_kernel_layers_are_composed_of_others(models, monkeypatch):
    ours, composed, calls = models
    monkeypatch.setattr(dispatch.decoder_layer, "implementations", ())
    others, kernel = [], dispatch.attention_inputs
    monkeypatch.setattr(few_rows, "attention_inputs", lambda *args: others.append(args) or kernel(*args))
    with torch.no_grad():
        results = [model(torch.tensor([[5, 7, 11]])).logits for model in (ours, composed)]
    assert not calls and len(others) == 4
    assert torch.equal(*results)


def test_other_caches_are_left_to_transformers(models):
    ours, composed, calls = models
    results = []
    for model in (ours, composed):
        cache = StaticCache(config=model.config, max_cache_len=8)
        with torch.no_grad():
            steps = [torch.tensor([[5, 7, 11]]), torch.tensor([[13]])]
            results.append([model(step, past_key_values=cache, use_cache=True).logits for step in steps])
    assert not calls
    torch.testing.assert_close(*results)


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


@pytest.fixture
def runs(monkeypatch):
    """How many layers each call of the library computes."""
    counts, run = [], pending.run
    monkeypatch.setattr(pending, "run", lambda steps: counts.append(len(steps)) or run(steps))
    return counts


def rotation_of(model, states, positions):
    return model.model.rotary_emb(states, torch.tensor([positions]))


def test_layers_of_a_forward_pass_are_computed_together(models, runs):
    ours, _, _ = models
    with torch.no_grad():
        ours(torch.tensor([[5, 7, 11]]))
        assert runs == [2]
        # Not where something else may read what a layer returns.
        states = torch.randn(1, 1, ours.config.hidden_size)
        rotation = rotation_of(ours, states, [0])
        first, second = (ours.model.layers[0](states, position_embeddings=rotation) for _ in range(2))
    assert runs == [2, 1, 1] and torch.equal(first, second)


def test_what_reads_the_output_of_a_layer_finds_it_computed(models, runs):
    ours, composed, _ = models
    ids = torch.tensor([[5, 7, 11]])
    with torch.no_grad():
        found, wanted = (model(ids, output_hidden_states=True).hidden_states for model in (ours, composed))
        assert not runs
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        for register in (torch.nn.Module.register_forward_hook, torch.nn.Module.register_forward_pre_hook):
            seen = []
            hook = register(ours.model.layers[1], lambda _, args, *out, seen=seen: seen.append((args[0], *out)))
            ours(ids)
            hook.remove()
            torch.testing.assert_close(seen[0][0], wanted[1], rtol=1e-4, atol=1e-4)
    assert runs == [1] * 4


def test_a_loop_of_ones_own_over_the_layers_finds_them_computed(models, runs, monkeypatch):
    ours, _, _ = models
    model, ids, seen = ours.model, torch.tensor([[5, 7, 11]]), []

    def forward(input_ids, **_):
        states = model.embed_tokens(input_ids)
        for layer in model.layers:
            states = layer(states, position_embeddings=rotation_of(ours, states, [0, 1, 2]))
            seen.append(states.clone())
        return seen

    with torch.no_grad():
        wanted = ours(ids, output_hidden_states=True).hidden_states
        monkeypatch.setattr(model, "forward", forward)
        model(ids)
    torch.testing.assert_close(seen[0], wanted[1], rtol=1e-4, atol=1e-4)
    assert runs == [1, 1]


def test_hooks_of_all_modules_are_heard(models, runs):
    ours, _, _ = models
    heard = []
    hook = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: heard.append(module))
    with torch.no_grad():
        ours(torch.tensor([[5, 7, 11]]))
    hook.remove()
    assert not runs and {layer.mlp.experts for layer in ours.model.layers} < set(heard)


@pytest.mark.parametrize("failure", [ZeroDivisionError, KeyboardInterrupt])
def test_a_forward_pass_that_failed_leaves_nothing_to_compute(failure, models, runs, monkeypatch):
    ours, _, _ = models
    ids, states = torch.tensor([[5, 7, 11]]), torch.randn(1, 1, ours.config.hidden_size)

    def fail(*_):
        raise failure

    with torch.no_grad():
        wanted = ours(ids).logits
        with monkeypatch.context() as patch, pytest.raises(failure):
            patch.setattr(ours.model.layers[1], "_step", fail)
            ours(ids)
        ours.model.layers[0](states, position_embeddings=rotation_of(ours, states, [0]))
        assert torch.equal(ours(ids).logits, wanted)
    assert runs == [2, 1, 2]


def test_layers_are_of_the_cache_by_their_present_numbers(models):
    ours, composed, calls = models
    results = []
    for model in (ours, composed):
        with torch.no_grad():
            model(torch.tensor([[5]]))
            model.model.layers = model.model.layers[::-1]
            for number, layer in enumerate(model.model.layers):
                layer.self_attn.layer_idx = number
            cache = DynamicCache(config=model.config)
            ids = torch.tensor([[5, 7, 11, 13, 17, 19, 23]])
            steps = [ids[:, :5], ids[:, 5:6], ids[:, 6:]]
            results.append([model(step, past_key_values=cache, use_cache=True).logits for step in steps])
    assert len(calls) == 6
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_documents_are_found_without_a_mask_too(models):
    ours, composed, calls = models
    states = torch.randn(1, 4, ours.config.hidden_size)
    positions = torch.tensor([[0, 1, 0, 1]])
    with torch.no_grad():
        results = [
            model.model.layers[0](
                states, position_ids=positions, position_embeddings=rotation_of(model, states, [0, 1, 0, 1])
            )
            for model in (ours, composed)
        ]
    assert len(calls) == 1
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_gradients_reach_a_cache(models):
    ours, _, calls = models
    cache, K, D = DynamicCache(config=ours.config), ours.config.num_key_value_heads, ours.config.head_dim
    prefix = [torch.randn(1, K, 2, D, requires_grad=True) for _ in range(2)]
    for number in range(2):
        cache.update(*prefix, number)
    ours(torch.tensor([[5]]), past_key_values=cache, use_cache=True).logits.sum().backward()
    assert not calls and all(states.grad.abs().sum() > 0 for states in prefix)


def test_states_of_another_dtype_or_shape_are_left_to_transformers(models):
    ours, _, calls = models
    states, layer = torch.randn(1, 1, ours.config.hidden_size), ours.model.layers[0]
    rotation = rotation_of(ours, states, [2])
    K, D = ours.config.num_key_value_heads, ours.config.head_dim
    with torch.no_grad():
        layer(states, position_embeddings=tuple(half.double() for half in rotation))
        assert not calls
        layer(states, position_embeddings=rotation)
        assert len(calls) == 1
        for heads in ((K, D), (K + 1, D)):
            cache = DynamicCache(config=ours.config)
            dtype = torch.float64 if heads == (K, D) else torch.float32
            cache.update(torch.randn(1, heads[0], 2, D), torch.randn(1, heads[0], 2, D, dtype=dtype), 0)
            with pytest.raises((RuntimeError, ValueError)):
                layer(states, past_key_values=cache, position_embeddings=rotation)
    assert len(calls) == 1


def test_replaced_weights_are_not_kept(models):
    ours, _, _ = models
    with torch.no_grad():
        ours(torch.tensor([[5]]))
        layer = ours.model.layers[0]
        replaced, layer.mlp.experts = weakref.ref(layer.mlp.experts), torch.nn.Identity()
        with pytest.raises((TypeError, AttributeError)):
            ours(torch.tensor([[5]]))
    gc.collect()
    assert replaced() is None


def test_layers_whose_hooks_of_accelerate_were_removed_are_whole_again(models, runs):
    ours, _, _ = models
    layer = ours.model.layers[0]
    for module in (layer, layer.mlp):
        add_hook_to_module(module, told_of([]))
        remove_hook_from_module(module)
    with torch.no_grad():
        ours(torch.tensor([[5]]))
    assert runs == [2]


@pytest.mark.parametrize(
    ("options", "rows"),
    [({}, 2), ({"num_beams": 3, "num_return_sequences": 2}, 1), ({"prompt_lookup_num_tokens": 2}, 1)],
    ids=["greedy, padded", "beams", "prompt lookup"],
)
def test_generates_what_composed_layers_generate(options, rows, models):
    ours, composed, calls = models
    ids = torch.tensor([[5, 7, 11, 7, 11, 13, 7], [3, 5, 7, 3, 5, 7, 5]])[:rows]
    mask = torch.ones_like(ids)
    if rows > 1:
        mask[0, 0] = 0
    settings = {"max_new_tokens": 8, "do_sample": False, "use_cache": True, "pad_token_id": 0, "eos_token_id": None}
    found, wanted = (model.generate(ids, attention_mask=mask, **settings, **options) for model in (ours, composed))
    assert calls and torch.equal(found, wanted)
