"""`attn_implementation="gptoss_ft"` against transformers' eager attention, on the same model."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StaticCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from gptoss_ft.errors import UserError
from gptoss_ft.kernels.reference import sink_attention
from gptoss_ft.model import attention
from gptoss_ft.model.init import init_checkpoint
from gptoss_ft.model.load import load_base
from gptoss_ft.training.loss import last_hidden_state, model_inputs

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


@pytest.fixture(scope="module")
def deep(small_spec, tmp_path_factory):
    """Ours with three layers of each kind."""
    folder = init_checkpoint(replace(small_spec, num_hidden_layers=6), tmp_path_factory.mktemp("deep"), progress=False)
    return load_base(folder, dtype=torch.float32, attn_implementation="gptoss_ft")


class Searches(TorchDispatchMode):
    """Counts how often documents are looked for, by an operation that nothing else in a step needs."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.cummax.default
        return func(*args, **kwargs or {})


@pytest.fixture
def told(monkeypatch):
    """Which documents and trees the attention of every layer was told of, in order."""
    found = []

    def recorded(*operands, documents_BS, tree, **settings):
        found.append((documents_BS, tree))
        return dispatched(*operands, documents_BS=documents_BS, tree=tree, **settings)

    dispatched = attention.sink_attention
    monkeypatch.setattr(attention, "sink_attention", recorded)
    return found


def packed(ids, *lengths):
    """A batch as for training: documents of these lengths in each row, and padding in the rest of it."""
    numbers = torch.tensor([*range(len(lengths)), -1]).repeat_interleave(
        torch.tensor([*lengths, LENGTH - sum(lengths)])
    )
    positions = torch.cat([*(torch.arange(length) for length in lengths), torch.zeros(LENGTH - sum(lengths)).long()])
    batch = {"document_ids": numbers.expand(2, -1), "position_ids": positions.expand(2, -1)}
    return batch | {"input_ids": ids, "attention_mask": (batch["document_ids"] >= 0).long()}


@contextmanager
def checkpointing(model) -> Iterator[None]:
    model.train().activation_checkpointing_enable()
    yield
    model.activation_checkpointing_disable()
    model.eval()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("given", ["ids", "padding", "positions", "documents", "trees"])
def test_documents_are_looked_for_once_for_each_kind_of_layer(deep, ids, told, given, mode):
    batch = packed(ids, 11, 20)
    with mode(), Searches() as searches:
        if given == "trees":
            batch["visible_until"] = torch.full_like(ids, LENGTH)
        if given in ("documents", "trees"):
            deep(**model_inputs(deep, batch))
        elif given == "positions":
            deep(ids, position_ids=batch["position_ids"], attention_mask=batch["attention_mask"])
        else:
            deep(ids, attention_mask=batch["attention_mask"] if given == "padding" else None)
    assert searches.count == (0 if given in ("documents", "trees") else 2) and len(told) == 6
    for kind in (told[::2], told[1::2]):
        tensors = [[documents, *(tree or ())] for documents, tree in kind]
        assert len({tuple(map(id, each)) for each in tensors}) == 1
        assert (tensors[0] == [None]) == (given == "ids") and len(tensors[0]) == (3 if given == "trees" else 1)
        # flex_attention keeps masks only by tensors that tell whether they were written to.
        assert not any(tensor.is_inference() for tensor in tensors[0] if tensor is not None)


@pytest.mark.parametrize("trees", [False, True])
def test_training_tells_all_layers_of_the_documents_that_it_knows(deep, ids, told, trees):
    batch = packed(ids, 11, 20)
    if trees:
        batch["visible_until"] = torch.full_like(ids, LENGTH)
    embedding = deep.get_input_embeddings().weight.requires_grad_()
    found = []
    for recomputed in (False, True):
        told.clear()
        with checkpointing(deep) if recomputed else torch.enable_grad(), Searches() as searches:
            hidden = last_hidden_state(deep, deep, model_inputs(deep, batch))
            (gradient,) = torch.autograd.grad(hidden[batch["document_ids"] >= 0].square().sum(), embedding)
        found.append((hidden.detach(), gradient))
        assert searches.count == 0 and len(told) == (12 if recomputed else 6)
        documents, tree = told[0]
        assert all(numbers is documents for numbers, _ in told)
        assert torch.equal(documents, batch["document_ids"]) and (tree is not None) == trees
        for _, other in told:
            assert tree is other or all(mine is first for mine, first in zip(other, tree, strict=True))
    embedding.requires_grad_(False)
    for first, again in zip(*found, strict=True):
        assert first.abs().max() > 0 and torch.equal(again, first)
    # And they are the documents that positions and padding show.
    with torch.no_grad():
        shown = deep.model(ids, position_ids=batch["position_ids"], attention_mask=batch["attention_mask"])
    real = batch["document_ids"] >= 0
    assert_close(shown[0][real], found[0][0][real])


def test_documents_found_with_a_gradient_are_there_when_layers_are_recomputed(deep, ids, told):
    positions = packed(ids, 11, 26)["position_ids"]
    embedding = deep.get_input_embeddings().weight.requires_grad_()
    (expected,) = torch.autograd.grad(deep(ids, position_ids=positions).logits.square().sum(), embedding)
    told.clear()
    with checkpointing(deep), Searches() as searches:
        loss = deep(ids, position_ids=positions, use_cache=False).logits.square().sum()
        (gradient,) = torch.autograd.grad(loss, embedding)
    embedding.requires_grad_(False)
    assert searches.count == 2 and len(told) == 12 and len({id(documents) for documents, _ in told}) == 2
    assert torch.equal(gradient, expected)


@torch.no_grad()
def test_positions_may_be_written_to_between_passes_and_shared_by_models(models, deep, ids):
    positions = packed(ids, 11, 26)["position_ids"].clone()
    one = torch.arange(LENGTH).expand(2, -1)
    expected = [
        [model(ids, position_ids=kept.clone()).logits for model in (models[1], deep)] for kept in (positions, one)
    ]
    assert not any(torch.allclose(*logits) for logits in zip(*expected, strict=True))
    for logits in expected:
        for model, truth in zip((models[1], deep), logits, strict=True):
            assert torch.equal(model(ids, position_ids=positions).logits, truth)
        positions.copy_(one)


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
