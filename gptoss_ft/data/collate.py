"""Samples, or rows packed with several of them, to padded batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gptoss_ft.data.sample import IGNORED_LABEL
from gptoss_ft.data.training_rows import TREE_COLUMNS
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
        width = max(len(sample["input_ids"]) for sample in samples)

        def padded(rows: Sequence[NDArray[Any]], value: float, dtype: torch.dtype = torch.long) -> Tensor:
            filled = torch.full((len(rows), width), value, dtype=dtype)
            for into, row in zip(filled, rows, strict=True):
                into[: len(row)] = torch.tensor(row, dtype=dtype)
            return filled

        batch = {
            "input_ids": padded([sample["input_ids"] for sample in samples], self.pad_token_id),
            "attention_mask": padded([np.ones(len(sample["input_ids"])) for sample in samples], 0),
            "labels": padded([sample["labels"] for sample in samples], IGNORED_LABEL),
        }
        if "loss_weights" in samples[0]:
            batch["loss_weights"] = padded([sample["loss_weights"] for sample in samples], 0.0, torch.float32)
        if "document_lengths" in samples[0]:
            lengths = [np.asarray(sample["document_lengths"]) for sample in samples]
            batch["document_ids"] = padded([np.repeat(np.arange(len(row)), row) for row in lengths], PADDING)
            if "position_ids" not in samples[0]:
                batch["position_ids"] = padded([np.concatenate([*map(np.arange, row)]) for row in lengths], 0)
        for name in TREE_COLUMNS:
            if name in samples[0]:
                batch[name] = padded([sample[name] for sample in samples], width if name == "visible_until" else 0)
        return batch
