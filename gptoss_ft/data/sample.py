"""One generation as training sees it."""

from dataclasses import dataclass

from gptoss_ft.harmony.generations import Generation

IGNORED_LABEL = -100  # what torch's cross entropy skips


@dataclass(frozen=True)
class Sample:
    """One generation as tokens, each with the weight of its loss (0: none).

    `row` is `file:line`, `generation` counts from 0 within the row.
    """

    input_ids: list[int]
    loss_weights: list[float]
    row: str
    generation: int

    @property
    def labels(self) -> list[int]:
        """`input_ids` where there is loss, -100 elsewhere."""
        weighted = zip(self.input_ids, self.loss_weights, strict=True)
        return [token if weight else IGNORED_LABEL for token, weight in weighted]

    @property
    def num_loss_tokens(self) -> int:
        return sum(map(bool, self.loss_weights))


def sample_of(generation: Generation, row: str) -> Sample:
    """A generation with its prompt, which has no loss; `row` is `file:line`."""
    return Sample(
        input_ids=generation.prompt_ids + generation.completion_ids,
        loss_weights=[0.0] * len(generation.prompt_ids) + generation.loss_weights,
        row=row,
        generation=generation.index,
    )
