"""Dense products of few rows against the reference, and attention by them against transformers' own."""

from copy import deepcopy

import pytest
import torch
from transformers import DynamicCache, GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention

from gptoss_ft.kernels import cpu_few_rows, cpu_gemm, dispatch, reference
from gptoss_ft.kernels.cases import Draw
from gptoss_ft.model import few_rows
from gptoss_ft.model.attention import ATTENTION
from gptoss_ft.model.few_rows import FewRowsAttention
from gptoss_ft.model.few_rows_layer import use_few_rows_layers
from gptoss_ft.model.linear import use_frozen_linear


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def operands(dtype, tokens=3, inputs=75, heads=(5, 2, 2), head_dim=40):
    draw = Draw(torch.device("cpu"), dtype)
    projections = [draw.normal(*shape) for n in heads for shape in ((n * head_dim, inputs), (n * head_dim,))]
    angles = draw.normal(tokens, head_dim // 2)
    return draw.normal(tokens, inputs), *projections, angles.cos(), angles.sin()


@pytest.mark.parametrize("dtype", dispatch.attention_inputs.dtypes, ids=str)
@pytest.mark.parametrize(
    "sizes", [{"tokens": 1}, {"tokens": 4, "head_dim": 64}, {"tokens": 2, "head_dim": 6, "heads": (7, 1, 1)}]
)
@pytest.mark.usefixtures("poisoned_memory", "isa")
def test_attention_inputs_err_at_most_twice_as_much_as_torch(sizes, dtype, assert_as_exact_as_torch):
    args = operands(dtype, **sizes)
    results = [cpu_few_rows.attention_inputs(*args), reference.attention_inputs(*args)]
    results.append(reference.attention_inputs(*(t.double() for t in args)))
    widths = [len(bias) for bias in args[2:7:2]]
    for name, *parts in zip("qkv", *(result.split(widths, dim=-1) for result in results), strict=True):
        assert_as_exact_as_torch(*parts, name)


@pytest.mark.parametrize("sizes", [(1, 3, 1), (3, 75, 100), (4, 64, 1000)], ids=str)
@pytest.mark.parametrize("dtype", dispatch.linear.dtypes, ids=str)
@pytest.mark.usefixtures("poisoned_memory", "isa")
def test_linear_has_the_bits_of_a_grouped_product(sizes, dtype):
    (tokens, inputs, outputs), draw = sizes, Draw(torch.device("cpu"), dtype)
    x, weight, bias = draw.normal(tokens, inputs), draw.normal(1, outputs, inputs), draw.normal(1, outputs)
    for some in (bias, None):
        args = x, weight[0], None if some is None else some[0]
        assert cpu_few_rows.takes(*args)
        one = cpu_few_rows.linear(*args)
        assert torch.equal(one, cpu_gemm.grouped_dense(x, weight, some, [tokens]))


@pytest.mark.usefixtures("isa")
def test_threads_change_no_bit(with_threads):
    args = operands(torch.bfloat16)
    first, *others = with_threads(lambda: cpu_few_rows.attention_inputs(*args))
    assert all(torch.equal(first, other) for other in others)
    x, weight = torch.randn(2, 32), torch.randn(1500, 32)
    first, *others = with_threads(lambda: cpu_few_rows.linear(x, weight, None))
    assert all(torch.equal(first, other) for other in others)


def test_mistakes_are_errors_and_never_reach_the_library():
    good = operands(torch.bfloat16)
    for position, wrong in (
        (0, good[0][:, 1:]),
        (1, good[1][1:]),
        (4, good[4][1:]),
        (7, good[7][1:]),
        (8, good[8][1:]),
    ):
        with pytest.raises(ValueError, match="must be"):
            cpu_few_rows.attention_inputs(*good[:position], wrong, *good[position + 1 :])
    x, weight, bias = torch.randn(2, 32), torch.randn(8, 32), torch.randn(8)
    assert cpu_few_rows.takes(x, weight, bias)
    wrong_x = (x[:0], x.repeat(3, 1), x[:, 1:], x[0], x.double())
    wrong_weights = (weight[:, 1:], weight.T.contiguous().T, weight.double(), weight[0], weight[:0])
    assert not any(cpu_few_rows.takes(wrong, weight, bias) for wrong in wrong_x)
    assert not any(cpu_few_rows.takes(x, wrong, None) for wrong in wrong_weights)
    assert not any(cpu_few_rows.takes(x, weight, wrong) for wrong in (bias[1:], bias[None], bias.double()))


@pytest.mark.parametrize(
    ("position", "wrong", "reason"),
    [
        (0, lambda t: t.repeat(3, 1), "there are 9 rows"),
        (7, lambda t: t.repeat(1, 7), "head dimension 280"),
        (3, lambda t: t.float(), "different dtypes"),
        (8, lambda t: t.float(), "not in the dtype"),
        (5, lambda t: t.t().contiguous().t(), "not contiguous"),
    ],
)
def test_what_the_library_does_not_take_is_refused(position, wrong, reason):
    args = list(operands(torch.bfloat16))
    assert cpu_few_rows.refusal(*args) == ""
    args[position] = wrong(args[position])
    assert reason in cpu_few_rows.refusal(*args)


@pytest.fixture
def layers(monkeypatch):
    """transformers' attention with the same attention function, ours of it, and the calls of its kernel."""
    config = GptOssConfig(hidden_size=96, num_attention_heads=6, num_key_value_heads=2, head_dim=16, sliding_window=5)
    config._attn_implementation = ATTENTION
    plain = GptOssAttention(config, 0).requires_grad_(False).eval()
    for parameter in plain.parameters():
        parameter.normal_(std=0.3)
    model = torch.nn.ModuleDict({"layer": deepcopy(plain)})
    use_few_rows_layers(model)
    use_frozen_linear(model)
    ours, calls, kernel = model["layer"], [], dispatch.attention_inputs
    assert type(ours) is FewRowsAttention and type(plain) is GptOssAttention
    monkeypatch.setattr(few_rows, "attention_inputs", lambda *args: calls.append(args) or kernel(*args))
    return plain, ours, calls


def attend(layer, hidden, start, cache):
    angles = torch.outer(torch.arange(start, start + hidden.shape[1]), torch.logspace(0, -3, 8))[None]
    turns = tuple(turn.expand(len(hidden), -1, -1) for turn in (angles.cos(), angles.sin()))
    with torch.no_grad():
        return layer(hidden, turns, None, cache)[0]


@pytest.mark.parametrize("batch", [1, 3])
def test_a_step_with_a_cache_computes_what_transformers_does(batch, layers):
    plain, ours, calls = layers
    caches = [DynamicCache(config=plain.config) for _ in range(2)]
    # Past the sliding window.
    for start, tokens in ((0, 4 // batch), (4 // batch, 7), (11, 1), (12, 1)):
        hidden = torch.randn(batch, tokens, 96)
        before = len(calls)
        results = (attend(layer, hidden, start, cache) for layer, cache in zip((ours, plain), caches, strict=True))
        torch.testing.assert_close(*results, rtol=2**-12, atol=2**-12)
        assert len(calls) - before == (batch * tokens <= 4)


def test_projections_that_are_more_than_a_product_are_left_to_transformers(layers):
    plain, ours, calls = layers
    hidden = torch.randn(1, 1, 96)
    seen = []
    hook = ours.k_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    torch.testing.assert_close(attend(ours, hidden, 3, None), attend(plain, hidden, 3, None), rtol=2**-12, atol=2**-12)
    assert len(seen) == 1 and not calls
    hook.remove()
    attend(ours, hidden, 3, None)
    assert len(calls) == 1
    ours.v_proj = torch.nn.Sequential(ours.v_proj)
    attend(ours, hidden, 3, None)
    assert len(calls) == 1


def test_gradients_are_those_of_transformers(layers):
    plain, ours, calls = layers
    hidden = torch.randn(1, 3, 96).requires_grad_()
    turns = torch.ones(1, 3, 8), torch.zeros(1, 3, 8)
    ours_x, plain_x = (torch.autograd.grad(layer(hidden, turns, None)[0].sum(), hidden)[0] for layer in (ours, plain))
    torch.testing.assert_close(ours_x, plain_x, rtol=2**-12, atol=2**-12)
    assert not calls
