"""Row files in other proportions than their sizes."""

from collections.abc import Sequence
from pathlib import Path
from random import Random

from gptoss_ft.data.dataset import Sample
from gptoss_ft.data.files import expand
from gptoss_ft.errors import UserError


def mix(samples: Sequence[Sample], paths: Sequence[str | Path], weights: Sequence[float], seed: int) -> list[Sample]:
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
    rows: list[dict[str, list[Sample]]] = [{} for _ in paths]
    for sample in samples:
        rows[source[sample.row.rpartition(":")[0]]].setdefault(sample.row, []).append(sample)
    random = Random(seed)
    mixed: list[Sample] = []
    for of_path, weight in zip(rows, weights, strict=True):
        names = list(of_path)
        drawn = set(random.sample(names, round(weight % 1 * len(names))))
        for name, of_row in of_path.items():
            mixed += of_row * (int(weight) + (name in drawn))
    if not mixed:
        raise UserError("data.weights leave no sample; raise one of them")
    return mixed
