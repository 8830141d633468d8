"""Samples into rows of one length: none is split, and little room stays empty."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PackedRows:
    """Which samples (or trees of them), by their place in the list, share a row; and how full the rows are."""

    rows: list[list[int]]
    tokens: int
    room: int

    def __str__(self) -> str:
        return f"packed as {self.tokens} into {len(self.rows)} rows, {self.tokens / self.room:.1%} full"


def best_fit(lengths: Sequence[int], capacity: int) -> PackedRows:
    """Put the longest first, each into the fullest row that still has room for it.

    Raises:
        ValueError: if one is longer than `capacity`.
    """
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows by the room that is left in them
    occupied = 0  # bit `room` is set if there are any: its lowest bit from a length on is the best fit
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        length = lengths[place]
        if length > capacity:
            raise ValueError(f"sample {place} has {length} tokens and a row holds {capacity}")
        fitting = occupied >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                occupied ^= 1 << room
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(place)
        with_room[room - length].append(row)
        occupied |= 1 << (room - length)
    return PackedRows(rows, tokens=sum(lengths), room=len(rows) * capacity)
