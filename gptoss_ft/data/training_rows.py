"""What a training step takes, each made from the table of samples when it is asked for."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from gptoss_ft.data.prefix_tree import PlannedTree, grow
from gptoss_ft.data.sample import IGNORED_LABEL
from gptoss_ft.data.sample_table import SampleTable

TREE_COLUMNS = ("position_ids", "predicted_from", "visible_until")


class TrainingRows(Dataset[dict[str, NDArray[Any]]]):
    """Columns by name; all rows of a set have the same."""

    def __iter__(self) -> Iterator[dict[str, NDArray[Any]]]:
        return (self[place] for place in range(len(self)))

    def __len__(self) -> int:
        raise NotImplementedError


class SampleRows(TrainingRows):
    """Samples as they are: `input_ids` and `labels`, int32, and `loss_weights`, float32, all `[T]`."""

    def __init__(self, samples: SampleTable):
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, place: int) -> dict[str, NDArray[Any]]:
        ids, weights = self._samples.arrays(place)
        return {"input_ids": ids, "labels": labels_of(ids, weights), "loss_weights": weights}


class PackedSamples(TrainingRows):
    """The columns of `SampleRows` for rows of several samples end to end, and `document_lengths`, int64 `[documents]`.

    No sample's first token has loss: there is nothing before it that could predict it.
    """

    def __init__(self, samples: SampleTable, rows: Sequence[Sequence[int]]):
        """`rows`: the places of each row's samples in the table."""
        self._samples, self._rows = samples, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: int) -> dict[str, NDArray[Any]]:
        parts = [self._samples.arrays(sample) for sample in self._rows[place]]
        ids = np.concatenate([ids for ids, _ in parts])
        weights = np.concatenate([weights for _, weights in parts])
        lengths = np.array([len(ids) for ids, _ in parts])
        weights[np.cumsum(lengths) - lengths] = 0
        return {
            "input_ids": ids,
            "labels": labels_of(ids, weights),
            "loss_weights": weights,
            "document_lengths": lengths,
        }


class PackedTrees(TrainingRows):
    """As `PackedSamples`, with trees for samples and where each token stands in its row's trees, int64 `[T]`.

    That is `position_ids`, and `predicted_from` and `visible_until` counted from the start of the row.
    """

    def __init__(self, samples: SampleTable, trees: Sequence[PlannedTree], rows: Sequence[Sequence[int]]):
        """`rows`: the places of each row's trees in `trees`."""
        self._samples, self._trees, self._rows = samples, trees, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: int) -> dict[str, NDArray[Any]]:
        trees = [grow(self._samples[at] for at in self._trees[tree].places) for tree in self._rows[place]]
        lengths = np.array([len(tree) for tree in trees])
        start = np.repeat(np.cumsum(lengths) - lengths, lengths)
        ids, weights, positions, before, until = (
            np.concatenate([np.array(getattr(tree, name), dtype) for tree in trees])
            for name, dtype in (
                ("input_ids", np.int32),
                ("loss_weights", np.float32),
                ("position_ids", np.int64),
                ("predicted_from", np.int64),
                ("visible_until", np.int64),
            )
        )
        return {
            "input_ids": ids,
            "labels": labels_of(ids, weights),
            "loss_weights": weights,
            "document_lengths": lengths,
            "position_ids": positions,
            "predicted_from": start + before,
            "visible_until": start + until,
        }


def labels_of(ids: NDArray[np.int32], weights: NDArray[np.float32]) -> NDArray[np.int32]:
    """`ids` where there is loss, -100 elsewhere."""
    return np.where(weights != 0, ids, np.int32(IGNORED_LABEL))
