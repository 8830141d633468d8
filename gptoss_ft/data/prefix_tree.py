"""Samples that begin alike, with the tokens they share only once.

Each generation of a conversation repeats the prompt, and often the whole, of the one before. In a tree of tokens a
hidden state depends on its own branch alone, so that it is the same for every sample that goes through it. The loss at
a token is the sum over these samples, and the token at a fork predicts the first of every branch.

Tokens are in depth-first order: what grows from a token follows it without a gap, and one number, where that ends, says
who may see the token.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile

import numpy as np

from gptoss_ft.data.sample import Sample
from gptoss_ft.data.sample_table import SampleTable


class PrefixTree:
    """One list entry per token: its id, the summed weight of its loss, and its place in the tree.

    Attributes:
        position_ids: its depth, from 0.
        predicted_from: the token before it, by place in this tree; one with nothing before it has itself.
        visible_until: the place behind the last token that grows from it.
        num_samples: how many samples end in it.
    """

    def __init__(self) -> None:
        self.input_ids: list[int] = []
        self.loss_weights: list[float] = []
        self.position_ids: list[int] = []
        self.predicted_from: list[int] = []
        self.visible_until: list[int] = []
        self.num_samples = 0
        self._branch: list[int] = []  # places of the sample added last

    def __len__(self) -> int:
        return len(self.input_ids)

    def size_with(self, sample: Sample) -> int:
        """How many tokens the tree would have with another sample."""
        return len(self) + len(sample.input_ids) - self._num_shared(sample)

    def add(self, sample: Sample) -> None:
        """Let another sample grow from what it shares with the one before; they come in the order of their tokens."""
        shared = self._num_shared(sample)
        weights = [0.0, *sample.loss_weights[1:]]  # nothing is before the first token that could predict it
        for place, weight in zip(self._branch[:shared], weights, strict=False):
            self.loss_weights[place] += weight
        new = range(len(self), self.size_with(sample))
        self._branch[shared:] = new
        self.input_ids += sample.input_ids[shared:]
        self.loss_weights += weights[shared:]
        self.position_ids += range(shared, len(sample.input_ids))
        self.predicted_from += [self._branch[max(depth - 1, 0)] for depth in range(shared, len(sample.input_ids))]
        self.visible_until += [0] * len(new)
        for place in self._branch:
            self.visible_until[place] = len(self)
        self.num_samples += 1

    def _num_shared(self, sample: Sample) -> int:
        pairs = zip(self._branch, sample.input_ids, strict=False)
        return sum(1 for _ in takewhile(lambda pair: self.input_ids[pair[0]] == pair[1], pairs))


@dataclass(frozen=True)
class PlannedTree:
    """Which samples of a table make a tree, by their places in the order of their tokens, and how large it is."""

    places: tuple[int, ...]
    size: int


def plan_trees(samples: SampleTable, capacity: int) -> Iterator[PlannedTree]:
    """A tree for the samples of each row of data, or several where one would have more than `capacity` tokens."""
    by_row = np.argsort(samples.row_numbers, kind="stable")
    starts = np.flatnonzero(np.diff(samples.row_numbers[by_row])) + 1
    for of_row in np.split(by_row, starts):
        held = sorted(((samples[int(place)], int(place)) for place in of_row), key=lambda pair: pair[0].input_ids)
        tree = PrefixTree()
        places: list[int] = []
        for sample, place in held:
            if places and tree.size_with(sample) > capacity:
                yield PlannedTree(tuple(places), len(tree))
                tree, places = PrefixTree(), []
            tree.add(sample)
            places.append(place)
        yield PlannedTree(tuple(places), len(tree))


def grow(samples: Iterable[Sample]) -> PrefixTree:
    """The tree of samples, which come in the order of their tokens."""
    tree = PrefixTree()
    for sample in samples:
        tree.add(sample)
    return tree
