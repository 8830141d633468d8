"""Samples that begin alike, with the tokens they share only once.

Each generation of a conversation repeats the prompt, and often the whole, of the one before. In a tree of tokens a
hidden state depends on its own branch alone, so that it is the same for every sample that goes through it. The loss at
a token is the sum over these samples, and the token at a fork predicts the first of every branch.

Tokens are in depth-first order: what grows from a token follows it without a gap, and one number, where that ends, says
who may see the token.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby, takewhile

from gptoss_ft.data.dataset import IGNORED_LABEL, Sample


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

    @property
    def labels(self) -> list[int]:
        """`input_ids` where there is loss, -100 elsewhere."""
        weighted = zip(self.input_ids, self.loss_weights, strict=True)
        return [token if weight else IGNORED_LABEL for token, weight in weighted]

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


def prefix_trees(samples: Sequence[Sample], capacity: int) -> Iterator[PrefixTree]:
    """A tree for the samples of each row of data, or several where one would have more than `capacity` tokens."""
    in_order = sorted(samples, key=lambda sample: (sample.row, sample.input_ids))
    for _, group in groupby(in_order, key=lambda sample: sample.row):
        tree = PrefixTree()
        for sample in group:
            if len(tree) and tree.size_with(sample) > capacity:
                yield tree
                tree = PrefixTree()
            tree.add(sample)
        yield tree
