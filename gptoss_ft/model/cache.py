"""Layers of `DynamicCache` that grow in place, so that a step does not copy all keys and values that are there.

B rows · K key/value heads · S positions · T new positions · D head dimension
"""

from typing import Any

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
        self._size, self.filled = self._states[0].shape[2], S
        for room, kept in zip(self._states, (keys_BKSD, values_BKSD), strict=True):
            room[:, :, :S] = kept

    def has(self, num_positions: int) -> bool:
        """Whether so many positions are free."""
        return self.filled + num_positions <= self._size

    def last(self, num_positions: int) -> tuple[Tensor, Tensor]:
        """The keys and values that were filled last."""
        keys, values = (room.narrow(2, self.filled - num_positions, num_positions) for room in self._states)
        return keys, values


class GrowingLayer(DynamicLayer):
    """`DynamicLayer` with room behind its keys and values."""

    keys: Tensor
    values: Tensor
    _room: Room | None = None
    # Keys and values that are the last in the room, if as many positions are filled.
    _last: tuple[Tensor, Tensor, int] | None = None

    def extended(self, T: int) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, K, S + T, D]`, whose last T positions are the caller's to write."""
        keys, values = self._extended(T)
        self._keep(keys, values)
        return keys, values

    def _extended(self, T: int) -> tuple[Tensor, Tensor]:
        S, room = self.keys.shape[2], self._room
        keys, values, filled = self._last or (None, None, 0)
        # Others that share the room, as a copy of this layer does, may have filled more of it.
        goes_on = room is not None and self.keys is keys and self.values is values and room.filled == filled
        if room is None or not goes_on or not room.has(T):
            self._forget()
            room = self._room = Room(self.keys, self.values)
        room.filled += T
        return room.last(S + T)

    def _forget(self) -> None:
        """Let go of the room, unless keys and values are in it."""
        self._room = self._last = None

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As transformers', which copies keys and values."""
        self._forget()
        return super().update(*args, **kwargs)

    def reset(self) -> None:
        """As transformers'."""
        self._forget()
        super().reset()

    def _keep(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        self._last = (keys, values, self._room.filled) if self._room else None


class GrowingSlidingWindowLayer(GrowingLayer, DynamicSlidingWindowLayer):
    """`DynamicSlidingWindowLayer` with room behind its keys and values."""

    def extended(self, T: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the window before the new positions, and of those, which are the caller's to write."""
        keys, values = self._extended(T)
        self.cumulative_length += T
        before = self.sliding_window - 1
        if keys.shape[2] <= before:
            self._keep(keys, values)
        else:
            self._keep(*(states[:, :, -before:] for states in (keys, values)))
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
