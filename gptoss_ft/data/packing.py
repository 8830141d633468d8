"""Samples into rows of one length: none is split, and little room stays empty."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from datasets import Dataset, Features, List, Value

from gptoss_ft.data.dataset import IGNORED_LABEL, Sample
from gptoss_ft.data.prefix_tree import PrefixTree

COLUMNS = ("input_ids", "labels", "loss_weights", "document_lengths")
TREE_COLUMNS = ("position_ids", "predicted_from", "visible_until")


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


def to_packed_dataset(samples: Sequence[Sample], rows: Sequence[Sequence[int]]) -> Dataset:
    """The columns of `to_dataset`, each row's samples end to end, and `document_lengths`.

    No sample's first token has loss: there is nothing before it that could predict it.
    """

    def joined(values: list[list], first: list) -> list[list]:
        return [[value for place in row for value in (first + values[place][len(first) :])] for row in rows]

    columns = {
        "input_ids": joined([sample.input_ids for sample in samples], []),
        "labels": joined([sample.labels for sample in samples], [IGNORED_LABEL]),
        "loss_weights": joined([sample.loss_weights for sample in samples], [0.0]),
        "document_lengths": [[len(samples[place].input_ids) for place in row] for row in rows],
    }
    return Dataset.from_dict(columns, features=_features(columns))


def to_tree_dataset(trees: Sequence[PrefixTree], rows: Sequence[Sequence[int]]) -> Dataset:
    """As `to_packed_dataset`, with trees for samples and where each token stands in its row's trees.

    That is `position_ids`, and `predicted_from` and `visible_until` counted from the start of the row.
    """
    columns: dict[str, list[list]] = {name: [] for name in (*COLUMNS, *TREE_COLUMNS)}
    for row in rows:
        joined: dict[str, list] = {name: [] for name in columns}
        for tree in (trees[place] for place in row):
            start = len(joined["input_ids"])
            for name in ("input_ids", "labels", "loss_weights", "position_ids"):
                joined[name] += getattr(tree, name)
            for name in ("predicted_from", "visible_until"):
                joined[name] += [start + place for place in getattr(tree, name)]
            joined["document_lengths"].append(len(tree))
        for name in columns:
            columns[name].append(joined[name])
    return Dataset.from_dict(columns, features=_features(columns))


def _features(columns: Iterable[str]) -> Features:
    return Features({name: List(Value("float32" if name == "loss_weights" else "int32")) for name in columns})
