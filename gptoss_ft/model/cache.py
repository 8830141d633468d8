"""Layers of `DynamicCache` that grow in place, so that a step does not copy all keys and values that are there.

B rows · K key/value heads · S positions · T new positions · D head dimension
"""

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

# Positions that fit into new memory beside those that are there, and beside a quarter of them.
SPARE = 64


class Room:
    """Memory for the keys and values of a layer, filled from the front.

    No position is written twice. So tensors that were given out keep what they hold, whoever has them.
    """

    def __init__(self, keys_BKSD: Tensor, values_BKSD: Tensor) -> None:
        B, K, S, D = keys_BKSD.shape
        self._states = tuple(t.new_empty(B, K, S + S // 4 + SPARE, D) for t in (keys_BKSD, values_BKSD))
        self._filled = S
        for room, kept in zip(self._states, (keys_BKSD, values_BKSD), strict=True):
            room[:, :, :S] = kept

    def ends_with(self, keys_BKSD: Tensor, values_BKSD: Tensor) -> bool:
        """Whether these are its last positions."""
        return all(map(self._is_end, self._states, (keys_BKSD, values_BKSD)))

    def _is_end(self, room: Tensor, states: Tensor) -> bool:
        start = self._filled - states.shape[2]
        address = room.data_ptr() + start * room.stride(2) * room.itemsize
        return states.data_ptr() == address and states.stride() == room.stride() and len(states) == len(room)

    def has(self, num_positions: int) -> bool:
        """Whether so many positions are free."""
        return self._filled + num_positions <= self._states[0].shape[2]

    def append(self, S: int, T: int) -> tuple[Tensor, Tensor]:
        """The last S positions and T more, which nobody has written yet."""
        start, self._filled = self._filled - S, self._filled + T
        keys, values = (room[:, :, start : self._filled] for room in self._states)
        return keys, values


class GrowingLayer(DynamicLayer):
    """`DynamicLayer` with room behind its keys and values."""

    keys: Tensor
    values: Tensor
    _room: Room | None = None

    def extended(self, T: int) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, K, S + T, D]`, whose last T positions are the caller's to write."""
        if self._room is None or not self._room.ends_with(self.keys, self.values) or not self._room.has(T):
            self._room = Room(self.keys, self.values)
        self.keys, self.values = self._room.append(self.keys.shape[2], T)
        return self.keys, self.values


class GrowingSlidingWindowLayer(DynamicSlidingWindowLayer, GrowingLayer):
    """`DynamicSlidingWindowLayer` with room behind its keys and values."""

    def extended(self, T: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the window before the new positions, and of those, which are the caller's to write."""
        keys, values = GrowingLayer.extended(self, T)
        self.cumulative_length += T
        self.keys, self.values = (states[:, :, 1 - self.sliding_window :] for states in (keys, values))
        return keys, values


KINDS: dict[type[DynamicLayer], type[GrowingLayer]] = {
    DynamicLayer: GrowingLayer,
    DynamicSlidingWindowLayer: GrowingSlidingWindowLayer,
}


def growing_layer(cache: Cache, index: int) -> GrowingLayer | None:
    """A layer of a cache, from now on growing in place; None if it is empty or of a kind that has none here."""
    if type(cache) is not DynamicCache or cache.offloading or index >= len(cache.layers):
        return None
    layer = cache.layers[index]
    if type(layer) in KINDS:
        # The same object: whoever has it, has the same keys and values as the cache.
        layer.__class__ = KINDS[type(layer)]
    if not isinstance(layer, GrowingLayer) or not layer.is_initialized or getattr(layer, "record_past", False):
        return None
    is_filled = isinstance(layer.keys, torch.Tensor) and layer.keys.ndim == 4
    return layer if is_filled else None
