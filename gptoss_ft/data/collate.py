"""Samples to padded batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptoss_ft.data.dataset import IGNORED_LABEL
from gptoss_ft.harmony.vocabulary import END_OF_TEXT


@dataclass(frozen=True)
class PaddingCollator:
    """Pads on the right to the longest sample."""

    pad_token_id: int = END_OF_TEXT

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` and `labels`, each int64 `[B, T]`; other columns are left out."""
        lengths = [len(sample["input_ids"]) for sample in samples]
        width = max(lengths)

        def padded(rows: list[list[int]], value: int) -> Tensor:
            return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.long)

        return {
            "input_ids": padded([sample["input_ids"] for sample in samples], self.pad_token_id),
            "attention_mask": padded([[1] * length for length in lengths], 0),
            "labels": padded([sample["labels"] for sample in samples], IGNORED_LABEL),
        }
