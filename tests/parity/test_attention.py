"""`attn_implementation="gptoss_ft"` against transformers' eager attention, on the same model."""

from types import SimpleNamespace

import pytest
import torch
from transformers import StaticCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from gptoss_ft.errors import UserError
from gptoss_ft.kernels.reference import sink_attention
from gptoss_ft.model.load import load_base

# Both kinds of layer see more than their window (8) here, and rows are no multiple of anything.
LENGTH = 37


@pytest.fixture(scope="module")
def models(small_bases):
    """eager and ours, fp32, with sinks far from zero: a checkpoint of random weights has them near it."""
    loaded = [
        load_base(small_bases["bf16"], precision="bf16", dtype=torch.float32, attn_implementation=implementation)
        for implementation in ("eager", "gptoss_ft")
    ]
    for model in loaded:
        assert set(model.config.layer_types) == {"full_attention", "sliding_attention"}
        torch.manual_seed(0)
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.sinks)
    assert loaded[0].config._attn_implementation == "eager" and loaded[1].config._attn_implementation == "gptoss_ft"
    return loaded


@pytest.fixture
def ids():
    return torch.randint(1, 500, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def padding(side):
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, slice(0, 5) if side == "left" else slice(-5, None)] = 0
    return mask


def assert_close(ours, theirs):
    assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max()


@pytest.mark.parametrize("window", [None, 8])
def test_the_reference_is_eager_attention(models, window):
    generator = torch.Generator().manual_seed(1)
    shapes = (2, 6, LENGTH, 16), (2, 2, LENGTH, 16), (2, 2, LENGTH, 16), (6,)
    operands = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    make_mask = create_causal_mask if window is None else create_sliding_window_causal_mask
    assert window in (None, models[0].config.sliding_window)
    mask = make_mask(models[0].config, torch.zeros(2, LENGTH, 1, dtype=torch.float64), None, None)
    module = SimpleNamespace(num_key_value_groups=3, sinks=operands[3], training=False)
    theirs = eager_attention_forward(module, *operands[:3], mask, 0.25)[0].transpose(1, 2)
    ours = sink_attention(*operands, scaling=0.25, window=window, documents_BS=None)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    weight = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
    for mine, expected in zip(
        *(torch.autograd.grad((o * weight).sum(), operands) for o in (ours, theirs)), strict=True
    ):
        torch.testing.assert_close(mine, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("side", [None, "left", "right"])
@torch.no_grad()
def test_logits_of_real_tokens_equal_eager(models, ids, side):
    mask = None if side is None else padding(side)
    real = torch.ones_like(ids) if mask is None else mask
    theirs, ours = (model(ids, attention_mask=mask).logits[real.bool()] for model in models)
    assert_close(ours, theirs)


def gradients(model, ids, mask, *, checkpointing):
    model.train()
    if checkpointing:
        model.activation_checkpointing_enable()
    layers = model.model.layers
    wanted = [layer.self_attn.sinks for layer in layers]
    wanted += [getattr(layer.self_attn, f"{name}_proj").weight for layer in layers for name in "qkvo"]
    for parameter in wanted:
        parameter.requires_grad_(True)
    labels = ids.masked_fill(mask == 0, -100)
    found = torch.autograd.grad(model(ids, attention_mask=mask, labels=labels).loss, wanted)
    model.activation_checkpointing_disable()
    model.requires_grad_(False).eval()
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_gradients_of_projections_and_sinks_equal_eager(models, ids, side, checkpointing):
    theirs, ours = (gradients(model, ids, padding(side), checkpointing=checkpointing) for model in models)
    for mine, expected in zip(ours, theirs, strict=True):
        assert expected.abs().max() > 0
        assert_close(mine, expected)


@torch.no_grad()
def test_packed_documents_see_what_they_see_alone(models, ids):
    lengths = (11, 1, 20, 5)
    positions = torch.cat([torch.arange(length) for length in lengths])[None].expand(2, -1)
    for use_cache in (False, True):
        packed = models[1](ids, position_ids=positions, use_cache=use_cache).logits.split(lengths, dim=1)
        for document, logits in zip(ids.split(lengths, dim=1), packed, strict=True):
            assert_close(logits, models[0](document).logits)


@torch.no_grad()
def test_packed_documents_equal_eager_with_masks_made_by_hand(models, ids):
    eager, ours = models
    positions = torch.cat([torch.arange(30), torch.arange(LENGTH - 30)])[None].expand(2, -1)
    arguments = (eager.config, torch.zeros(2, LENGTH, 1), None, None, positions)
    masks = {
        "full_attention": create_causal_mask(*arguments),
        "sliding_attention": create_sliding_window_causal_mask(*arguments),
    }
    theirs = eager(ids, position_ids=positions, attention_mask=masks).logits
    assert_close(ours(ids, position_ids=positions).logits, theirs)
    with pytest.raises(UserError, match=r"no mask of shape \(2, 1, 37, 37\)"):
        ours(ids, position_ids=positions, attention_mask=masks)


@torch.no_grad()
def test_padding_before_and_between_packed_documents_is_not_seen(models, ids):
    mask = torch.ones_like(ids)
    mask[:, :4] = mask[:, 20:23] = 0
    positions = torch.cat([torch.full((4,), 7), torch.arange(16), torch.zeros(3), torch.arange(14)]).long()[None]
    packed = models[1](ids, attention_mask=mask, position_ids=positions).logits
    for part in (slice(4, 20), slice(23, LENGTH)):
        assert_close(packed[:, part], models[0](ids[:, part]).logits)
    # One document with a hole in it: positions go on after the hole.
    mask, positions = torch.ones_like(ids), torch.arange(LENGTH)
    mask[:, 9:12] = 0
    positions[12:] -= 3
    positions[9:12] = 1
    theirs, ours = (model(ids, attention_mask=mask, position_ids=positions[None]).logits for model in models)
    assert_close(ours[mask.bool()], theirs[mask.bool()])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("padded", [False, True])
def test_generated_tokens_equal_eager(models, ids, padded, beams, cache):
    settings = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    settings |= {"use_cache": True, "disable_compile": True}
    settings |= {"cache_implementation": "static"} if cache == "static" else {}
    mask = padding("left") if padded else torch.ones_like(ids)
    theirs, ours = (model.generate(ids, attention_mask=mask, **settings) for model in models)
    assert theirs.shape == (2, LENGTH + 20)
    assert torch.equal(ours, theirs)


@torch.no_grad()
def test_a_prompt_in_pieces_equals_the_whole(models, ids):
    whole = models[0](ids).logits
    for past in (None, StaticCache(models[1].config, max_cache_len=64)):
        pieces = []
        for piece in ids.split((6, 13, 1, 17), dim=1):
            output = models[1](piece, past_key_values=past, use_cache=True)
            past = output.past_key_values
            pieces.append(output.logits)
        assert_close(torch.cat(pieces, dim=1), whole)


@torch.no_grad()
def test_a_new_document_cannot_continue_a_cache(models, ids):
    past = models[1](ids[:, :10], use_cache=True).past_key_values
    with pytest.raises(UserError, match="use_cache=False"):
        models[1](ids[:, 10:14], position_ids=torch.tensor([[10, 11, 0, 1]]), past_key_values=past, use_cache=True)


def test_dropout_is_refused(models, ids):
    attention = models[1].model.layers[0].self_attn
    attention.attention_dropout = 0.1
    try:
        models[1].train()
        with pytest.raises(UserError, match="attention_dropout"):
            models[1](ids)
    finally:
        attention.attention_dropout = 0.0
        models[1].eval()
