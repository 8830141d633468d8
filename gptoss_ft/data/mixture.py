"""Row files in other proportions than their sizes."""

from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np

from gptoss_ft.data.files import expand
from gptoss_ft.data.sample_table import SampleTable
from gptoss_ft.errors import UserError


def mix(samples: SampleTable, paths: Sequence[str | Path], weights: Sequence[float], seed: int) -> SampleTable:
    """The samples of an epoch in which each row of `paths[i]` is seen `weights[i]` times.

    The whole part of a weight repeats every row; the rest of it adds that share of the rows once, drawn by `seed`.
    A row's generations stay together.

    Raises:
        UserError: if a file belongs to two of the paths, or no sample is left.
    """
    source: dict[str, int] = {}
    for index, path in enumerate(paths):
        for file in expand([path]):
            if file in source:
                raise UserError(
                    f"{file}: belongs to two entries of data.path, so that its weight is unclear; name it once"
                )
            source[file] = index
    source_of_file = np.array([source[file] for file in samples.files])
    source_of_sample = source_of_file[samples.file_numbers]
    random = Random(seed)
    mixed = [np.empty(0, np.int64)]
    for index, weight in enumerate(weights):
        places = np.flatnonzero(source_of_sample == index)
        # Samples are in the order of their rows.
        _, first = np.unique(samples.row_numbers[places], return_index=True)
        drawn = set(random.sample(range(len(first)), round(weight % 1 * len(first))))
        for number, of_row in enumerate(np.split(places, first[1:])):
            mixed += [of_row] * (int(weight) + (number in drawn))
    if not sum(map(len, mixed)):
        raise UserError("data.weights leave no sample; raise one of them")
    return samples.take(np.concatenate(mixed))
