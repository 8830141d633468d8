"""The positions of rows at which models are compared: those whose next token carries loss.

T tokens · P chosen positions
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from gptoss_ft.data.sample import IGNORED_LABEL, Sample
from gptoss_ft.errors import UserError


@dataclass(frozen=True)
class Excerpt:
    """The start of a sample, as far as it is needed, and the positions whose next token carries loss."""

    sample: Sample
    input_ids_T: Tensor
    positions_P: Tensor

    @property
    def places(self) -> list[str]:
        """Row, generation and predicted token of each position."""
        row = f"{self.sample.row} generation {self.sample.generation}"
        return [f"{row} token {position + 1}" for position in self.positions_P.tolist()]


def select_positions(samples: Sequence[Sample], max_positions: int, *, max_tokens: float = inf) -> list[Excerpt]:
    """The first `max_positions` positions that carry loss, and the tokens up to them.

    Args:
        max_tokens: of all excerpts together; samples that have no position within what is left of it are passed over,
            and where all are, one position is taken all the same.

    Raises:
        UserError: if no token carries loss.
    """
    excerpts: list[Excerpt] = []
    shortest: Excerpt | None = None
    for sample in samples:
        # The logits of one position predict the token of the next.
        positions = [t - 1 for t, label in enumerate(sample.labels) if t and label != IGNORED_LABEL]
        if not positions:
            continue
        if shortest is None or positions[0] < shortest.positions_P[0]:
            shortest = _excerpt(sample, positions[:1])
        positions = [position for position in positions[:max_positions] if position < max_tokens]
        if positions:
            excerpts.append(_excerpt(sample, positions))
            max_positions -= len(positions)
            max_tokens -= positions[-1] + 1
        if not max_positions:
            break
    if shortest is None:
        raise UserError("no token of the rows to compare on carries loss: give other rows with data=FILE")
    return excerpts or [shortest]


def _excerpt(sample: Sample, positions: list[int]) -> Excerpt:
    return Excerpt(sample, torch.tensor(sample.input_ids[: positions[-1] + 1]), torch.tensor(positions))
