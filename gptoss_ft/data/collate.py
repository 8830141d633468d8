"""Samples, or rows packed with several of them, to padded batches."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptoss_ft.data.dataset import IGNORED_LABEL
from gptoss_ft.data.packing import TREE_COLUMNS
from gptoss_ft.harmony.vocabulary import END_OF_TEXT

PADDING = -1  # as a document's number


@dataclass(frozen=True)
class PaddingCollator:
    """Pads on the right to the longest sample or row."""

    pad_token_id: int = END_OF_TEXT

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` and `labels`, each int64 `[B, T]`, and what else the samples call for.

        `loss_weights`, fp32 `[B, T]`, if they have them. `position_ids` and `document_ids`, int64 `[B, T]`, if they
        are packed rows: positions start anew with each document, documents count from 0, padding is number -1.
        `predicted_from` and `visible_until`, int64 `[B, T]`, if their documents are prefix trees.
        """
        lengths = [len(sample["input_ids"]) for sample in samples]
        width = max(lengths)

        def padded(rows: Iterable[Sequence[float]], value: float, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=dtype)

        batch = {
            "input_ids": padded([sample["input_ids"] for sample in samples], self.pad_token_id),
            "attention_mask": padded([[1] * length for length in lengths], 0),
            "labels": padded([sample["labels"] for sample in samples], IGNORED_LABEL),
        }
        if "loss_weights" in samples[0]:
            batch["loss_weights"] = padded([sample["loss_weights"] for sample in samples], 0.0, torch.float32)
        if "document_lengths" in samples[0]:
            documents = [sample["document_lengths"] for sample in samples]
            numbers = [[number for number, size in enumerate(row) for _ in range(size)] for row in documents]
            batch["document_ids"] = padded(numbers, PADDING)
            if "position_ids" not in samples[0]:
                batch["position_ids"] = padded([[at for size in row for at in range(size)] for row in documents], 0)
        for name in TREE_COLUMNS:
            if name in samples[0]:
                batch[name] = padded([sample[name] for sample in samples], width if name == "visible_until" else 0)
        return batch
