"""Layers of a cache that grow in place, against transformers' own, which copies at every step."""

import gc
import weakref
from copy import copy, deepcopy

import pytest
import torch
from transformers import DynamicCache, GptOssConfig, StaticCache

from gptoss_ft.model.cache import SPARE, growing_layer

WINDOW = 9
CONFIG = GptOssConfig(num_hidden_layers=2, num_key_value_heads=2, num_attention_heads=4, sliding_window=WINDOW)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=[0, 1], ids=["sliding", "full"])
def index(request):
    """Of a layer of either kind."""
    return request.param


def states(T, B=2):
    return torch.randn(B, 2, T, 8), torch.randn(B, 2, T, 8)


def filled(index, T=5):
    """A cache whose layer holds T positions, and a copy of it."""
    cache = DynamicCache(config=CONFIG)
    cache.update(*states(T), index)
    return cache, deepcopy(cache)


def grow(cache, index, keys, values):
    """What a step of generation does with the layer of a cache."""
    T, found = keys.shape[2], growing_layer(cache, index).extended(keys.shape[2])
    for room, new in zip(found, (keys, values), strict=True):
        room[:, :, -T:] = new
    return found


def assert_same(cache, other, index):
    one, two = cache.layers[index], other.layers[index]
    assert torch.equal(one.keys, two.keys) and torch.equal(one.values, two.values)
    assert one.get_seq_length() == two.get_seq_length() and one.get_mask_sizes(1) == two.get_mask_sizes(1)


def test_steps_leave_what_updates_leave(index):
    cache, plain = filled(index)
    # Past the window, and past the room of the first steps.
    for T in (1, 3, 1, *[1] * (SPARE + 20), 4):
        new = states(T)
        for one, other in zip(grow(cache, index, *new), plain.update(*new, index), strict=True):
            assert torch.equal(one, other)
        assert_same(cache, plain, index)


def test_most_steps_copy_nothing(index):
    cache, _ = filled(index)
    storages = {grow(cache, index, *states(1))[0].untyped_storage().data_ptr() for _ in range(SPARE)}
    assert len(storages) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda cache, index: cache.update(torch.ones(2, 2, 1, 8), torch.ones(2, 2, 1, 8), index),
        lambda cache, index: cache.reorder_cache(torch.tensor([1, 1])),
        lambda cache, index: cache.layers[index].crop(-2),
        lambda cache, index: cache.layers[index].batch_repeat_interleave(2),
        lambda cache, index: cache.layers[index].batch_select_indices(torch.tensor([0, 0])),
    ],
    ids=["update", "reorder", "crop", "repeat", "select"],
)
def test_steps_go_on_after_what_else_changes_a_cache(change, index):
    cache, plain = filled(index, 3)
    for _ in range(2):
        new = states(1, len(plain.layers[index].keys))
        grow(cache, index, *new), plain.update(*new, index)
        change(cache, index), change(plain, index)
        assert_same(cache, plain, index)


def test_tensors_that_were_given_out_keep_what_they_hold(index):
    cache, _ = filled(index)
    grow(cache, index, *states(1))
    layer = cache.layers[index]
    given, before = layer.keys, layer.keys.clone()
    layer.crop(-2)
    grow(cache, index, *states(1))
    assert torch.equal(given, before)


@pytest.mark.parametrize("copied", [copy, deepcopy])
def test_copies_of_a_layer_grow_apart(copied, index):
    cache, plain = filled(index)
    new = states(1)
    grow(cache, index, *new), plain.update(*new, index)
    other, other_plain = DynamicCache(config=CONFIG), deepcopy(plain)
    other.layers[index] = copied(cache.layers[index])
    for of, plain_of in ((cache, plain), (other, other_plain)):
        new = states(1)
        grow(of, index, *new), plain_of.update(*new, index)
    assert_same(cache, plain, index)
    assert_same(other, other_plain, index)


def test_other_caches_and_empty_layers_do_not_grow(index):
    assert growing_layer(DynamicCache(config=CONFIG), index) is None
    static = StaticCache(config=CONFIG, max_cache_len=20)
    static.update(*states(2), index)
    assert growing_layer(static, index) is None
    cache, _ = filled(index)
    if hasattr(cache.layers[index], "activate_past_recording"):
        cache.layers[index].activate_past_recording()
        assert growing_layer(cache, index) is None


@pytest.mark.parametrize("change", ["update", "reset"])
def test_what_replaces_a_cache_frees_its_room(change, index):
    cache, _ = filled(index)
    room = weakref.ref(grow(cache, index, *states(1))[0]._base)
    if change == "update":
        cache.update(*states(1), index)
    else:
        cache.reset()
    gc.collect()
    assert room() is None
