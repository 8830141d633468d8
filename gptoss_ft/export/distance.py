"""How far one model's logits are from another's, per position.

P positions · V vocabulary
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import isfinite, sqrt
from typing import Any, cast

import torch
from torch import Tensor

# Rows widened to fp64 at once: 16 x 201,088 classes are 26 MB a copy.
CHUNK_ROWS = 16


@dataclass(frozen=True)
class Distances:
    """Distances of logits z from the wanted z*, each `[P]`.

    Attributes:
        kl_nats: KL(softmax z* || softmax z).
        relative: |z - z*| / |z* - mean z*|, Euclidean norms over the vocabulary.
        same_top: whether the most likely tokens agree.
    """

    kl_nats: Tensor
    relative: Tensor
    same_top: Tensor

    @classmethod
    def between(cls, wanted_PV: Tensor, logits_PV: Tensor) -> "Distances":
        """Measured in fp64, where a KL divergence of 1e-12 is still above rounding; NaN logits are infinitely far."""
        parts = [
            _measure(wanted.double(), logits.double())
            for wanted, logits in zip(wanted_PV.split(CHUNK_ROWS), logits_PV.split(CHUNK_ROWS), strict=True)
        ]
        return cls(*(torch.cat(columns) for columns in zip(*parts, strict=True)))

    @classmethod
    def join(cls, parts: Sequence["Distances"]) -> "Distances":
        """The positions of all parts, in order."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def summary(self) -> dict[str, float]:
        """Median, 95th percentile, maximum and mean of both distances, and the share of equal most likely tokens."""
        numbers = {}
        for name, values in (("kl_nats", self.kl_nats), ("relative", self.relative)):
            numbers[f"{name}_median"] = quantile(values, 0.5)
            numbers[f"{name}_p95"] = quantile(values, 0.95)
            numbers[f"{name}_max"] = float(values.max())
            numbers[f"{name}_mean"] = float(values.mean())
        return {**numbers, "same_top_share": float(self.same_top.double().mean())}


def fidelity(base: Distances, exported: Distances) -> float | None:
    """How much of what training did an export keeps: 1 is all of it, 0 is as far from the trained model as the base is.

    With both distances from the trained model, it is 1 - sqrt(median KL of the export / median KL of the base). KL
    grows with the square of a small change, so the root makes it a share of the way: an export half way between base
    and trained model has 0.5, less is nearer to the base, and one that is farther off than the base is negative.
    Medians, because rounding flips the choice of experts at single positions, one of which made a mean 500 times the
    median. None where the base is the trained model.
    """
    left, effect = (quantile(distances.kl_nats, 0.5) for distances in (exported, base))
    return 1 - sqrt(left / effect) if effect else None


def quantile(values: Tensor, q: float) -> float:
    """The smallest of `values` that at least a share `q` of them do not exceed."""
    return float(values.quantile(q, interpolation="higher"))


def finite(content: dict[str, Any]) -> dict[str, Any]:
    """The content with None for what is not finite, which JSON cannot say."""
    return cast(dict[str, Any], _finite(content))


def _finite(content: object) -> object:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not isfinite(content) else content


def _measure(wanted_PV: Tensor, logits_PV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    log_p, log_q = wanted_PV.log_softmax(-1), logits_PV.log_softmax(-1)
    kl_P = (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0)
    spread_P = (wanted_PV - wanted_PV.mean(-1, keepdim=True)).norm(dim=-1)
    relative_P = (logits_PV - wanted_PV).norm(dim=-1) / spread_P
    same_P = wanted_PV.argmax(-1) == logits_PV.argmax(-1)
    return _infinite_if_nan(kl_P), _infinite_if_nan(relative_P), same_P


def _infinite_if_nan(values: Tensor) -> Tensor:
    return values.nan_to_num(nan=torch.inf, posinf=torch.inf)
