"""The bounds that an export has to keep, and the report that says whether it does.

The measurements that the bounds quote are of LoRA with r=8 on four models of 2 to 4 layers, on attention, on experts
and on both: random, moving the weights by 0.06 to 3 %, and trained for 1, 5 and 40 steps, moving them by 2 to 60 %.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf, isinf
from pathlib import Path
from typing import Any

from gptoss_ft.config.values import MIN_FIDELITY
from gptoss_ft.export.distance import Distances, fidelity, finite, quantile
from gptoss_ft.export.merge import MERGE_FILE
from gptoss_ft.export.weights import Kind, WeightDistance

# Two fp32 implementations of one model differ in the order of sums: 95 % of the positions were within 1e-6. At the
# few beyond, a tie between two experts may have fallen differently.
SAME_MODEL_P95 = 1e-4

# Largest |exported - trained| / |trained| of any block of 32 weights. bf16 rounds to 8 significant bits: 2^-8, and a
# little for the order of the sums that were rounded. MXFP4 to nearest: 0.393 at worst, with one element at 3.5 scales
# and the others at a quarter of one; 0.19 was seen. A swapped row is off by 1.4, a zeroed scale by 1.
# ggml's 8 bits: half a step of amax / 127 for each of 32, on top of bf16. An adapter's factors may have been rescaled,
# in fp32, on the way: their product counts. A rounding for inputs puts up with any error of a block that its neighbours
# make good; what it wrote and corrected is known by its hash instead.
WEIGHT_BOUNDS: dict[Kind, float] = {
    "copied": 0.0,
    "update": 1e-5,
    "bf16": 1.01 * 2**-8,
    "q8_0": 32**0.5 / 254 + 1.1 * 2**-8,
    "mxfp4": 0.4,
    "dithered": 0.0,
    "merged": 0.0,
    "calibrated": inf,
    "corrected": inf,
}

# bf16 arithmetic, in which servers run these models, moves logits by 0.8 % of their spread; weights rounded to bf16
# moved them by 0.1 to 0.8 %. Below this nobody can see whether an export kept a change.
ARITHMETIC_NOISE = 1e-2
# llama.cpp rounds activations to 8 bits where they meet MXFP4 or 8-bit weights, and to bf16 where they meet bf16: that
# moved logits by 0.9 %, and by 1.9 % with 8-bit matrices.
LLAMA_CPP_NOISE = 3e-2

# What was kept, as `distance.fidelity`: of trained adapters bf16 kept 0.95 at least, llama.cpp's arithmetic 0.98 of
# adapters. MXFP4 kept 0.52 at least, except where one step had trained experts alone: rounding to nearest then wrote
# the base again, and kept nothing.

# Adapters that a program in fp32 opened.
EXACT_ADAPTERS = ("adapter", "adapter_sglang")


def fidelity_fault(
    base: Distances, exported: Distances, min_fidelity: float, *, noise: float = ARITHMETIC_NOISE
) -> str | None:
    """What is wrong with a merged model that keeps too little of the training; None if nothing is.

    Nothing is, whatever its fidelity, within the noise of the arithmetic that will run it, or if `min_fidelity` is 0.

    Args:
        base, exported: distances from the trained model.
        noise: what that arithmetic moves logits by, the median of `Distances.relative`.
    """
    kept = fidelity(base, exported)
    kept_enough = min_fidelity == 0 or (kept is not None and kept >= min_fidelity)
    if kept_enough or quantile(exported.relative, 0.5) <= noise:
        return None
    left, effect = (quantile(distances.kl_nats, 0.5) for distances in (exported, base))
    measured = "the training changes nothing here" if kept is None else f"fidelity {kept:.2f}, below {min_fidelity:g}"
    return f"{measured}: median KL from the trained model is {left:.2g} nats, and the base's is {effect:.2g}"


@dataclass(frozen=True)
class Reading:
    """What one program made of the export.

    Attributes:
        from_first: distances from what the first program computed; None for the first.
        noise: what the program's own arithmetic moves logits by, the median of `Distances.relative`.
    """

    program: str
    is_ours: bool
    from_trained: Distances
    from_first: Distances | None = None
    noise: float = ARITHMETIC_NOISE


@dataclass(frozen=True)
class WeightCheck:
    """Every weight against what was trained, experts singly: the worst of each kind, and those out of bounds."""

    num_compared: int
    worst: dict[Kind, WeightDistance]
    outside: list[WeightDistance]

    @classmethod
    def of(cls, distances: Iterable[WeightDistance]) -> "WeightCheck":
        num_compared = 0
        worst: dict[Kind, WeightDistance] = {}
        outside = []
        for distance in distances:
            num_compared += 1
            if distance.altered or distance.worst > WEIGHT_BOUNDS[distance.kind]:
                outside.append(distance)
            if distance.kind not in worst or distance.worst > worst[distance.kind].worst:
                worst[distance.kind] = distance
        return cls(num_compared, worst, outside)


@dataclass(frozen=True)
class VerifyReport:
    """How far an export is from the trained model.

    Attributes:
        places: row, generation and token of every compared position.
        base: distances of the base without the adapter from the trained model: the effect of the training.
        not_run: programs that did not open the export, and why.
        cure: what to do if it keeps too little.
    """

    export: Path
    format: str
    places: list[str]
    base: Distances
    readings: list[Reading]
    not_run: dict[str, str]
    weights: WeightCheck
    cure: str
    min_fidelity: float = MIN_FIDELITY

    @property
    def failures(self) -> list[str]:
        """Every bound that is not kept, with numbers and cure, and what could not be tried; empty if it is good."""
        return [*self._damage(), *self._disagreement(), *self._lost_training(), *self._unproven()]

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def verdict(self) -> str:
        """PASSED, FAILED, or NOT VERIFIED where nothing is known to be wrong but no other program could be asked."""
        if self.passed:
            return "PASSED"
        return "NOT VERIFIED" if self.failures == self._unproven() else "FAILED"

    @property
    def notes(self) -> list[str]:
        """What the reader of a passed report should know all the same."""
        effect = quantile(self.base.relative, 0.5)
        if effect == 0:
            return ["the adapter changes nothing on these rows, so that the export keeps it says little"]
        noise = max((reading.noise for reading in self.readings), default=ARITHMETIC_NOISE)
        if self.format not in EXACT_ADAPTERS and effect <= noise:
            return [
                f"the training moves the logits by {effect:.1e}, less than the arithmetic of servers does "
                f"({noise:.0e}): whether the export keeps that much cannot be told"
            ]
        return []

    def to_dict(self) -> dict[str, Any]:
        """For JSON: verdict, bounds, summaries, and the numbers of every position; what is not finite becomes None."""
        columns = {"base": self.base, **{reading.program: reading.from_trained for reading in self.readings}}
        content = {
            "export": str(self.export),
            "format": self.format,
            "passed": self.passed,
            "verdict": self.verdict,
            "failures": self.failures,
            "notes": self.notes,
            "bounds": {
                "readers_agree_relative_p95": SAME_MODEL_P95,
                "weight_block_relative": WEIGHT_BOUNDS,
                "arithmetic_noise_relative_median": ARITHMETIC_NOISE,
                "min_fidelity": self.min_fidelity,
            },
            "fidelity": {reading.program: fidelity(self.base, reading.from_trained) for reading in self.readings},
            "distance_from_trained": {name: distances.summary() for name, distances in columns.items()},
            "distance_from_first_reader": {
                reading.program: reading.from_first.summary() for reading in self.readings if reading.from_first
            },
            "not_run": self.not_run,
            "weights": {
                "num_compared": self.weights.num_compared,
                "num_outside": len(self.weights.outside),
                "worst": {kind: {"weight": w.place, "relative": w.worst} for kind, w in self.weights.worst.items()},
            },
            "positions": {
                "place": self.places,
                **{
                    name: {
                        "kl_nats": distances.kl_nats.tolist(),
                        "relative": distances.relative.tolist(),
                        "same_top": distances.same_top.tolist(),
                    }
                    for name, distances in columns.items()
                },
            },
        }
        return finite(content)

    def __str__(self) -> str:
        rows = len({place.rpartition(" generation ")[0] for place in self.places})
        lines = [
            f"{self.verdict}  {self.export} ({self.format}) at {len(self.places)} positions of {rows} rows",
            f"  {'distance from the':24}{'KL, nats':^40}{'logits, relative':^40}{'same top':>8}",
            f"  {'trained model':24}{_HEADINGS * 2}{'token':>8}",
            _line("base without adapter", self.base),
            *(_line(reading.program, reading.from_trained) for reading in self.readings),
        ]
        agreeing = [quantile(reading.from_first.relative, 0.95) for reading in self.readings if reading.from_first]
        if agreeing:
            lines.append(f"  readers within {max(agreeing):.1e} of the first at 95 % (bound {SAME_MODEL_P95:.0e})")
        lines += [f"  not run: {program}: {reason}" for program, reason in self.not_run.items()]
        kinds = [f"{kind} {found.worst:.2g} ({_bound(kind)})" for kind, found in self.weights.worst.items()]
        lines.append(f"  worst block of {self.weights.num_compared} weights, relative: {', '.join(kinds)}")
        lines += [f"  far: {line}" for line in self._farthest()]
        lines += [f"  note: {note}" for note in self.notes]
        unproven = self._unproven()
        lines += [f"  failed: {failure}" for failure in self.failures if failure not in unproven]
        lines += [f"  {failure}" for failure in unproven]
        return "\n".join(lines)

    def _damage(self) -> list[str]:
        if not self.weights.outside:
            return []
        worst = max(self.weights.outside, key=lambda distance: distance.worst)
        allowed = f"{worst.kind} allows {WEIGHT_BOUNDS[worst.kind]:.2g}"
        if worst.altered:
            allowed = f"{MERGE_FILE} has another hash of what was written"
        return [
            f"{len(self.weights.outside)} of {self.weights.num_compared} weights are not what was trained; "
            f"{worst.place} is off by {worst.worst:.2g} in a block, where {allowed}: "
            "the file is damaged or of another run, export again"
        ]

    def _disagreement(self) -> list[str]:
        first = self.readings[0].program if self.readings else ""
        return [
            f"{reading.program} and {first} differ by {apart:.1e} at 95 % of the positions, where the order of sums "
            f"explains {SAME_MODEL_P95:.0e}: the file does not mean the same to both, do not serve it"
            for reading in self.readings
            if reading.from_first and (apart := quantile(reading.from_first.relative, 0.95)) > SAME_MODEL_P95
        ]

    def _lost_training(self) -> list[str]:
        """The first fault that another program's logits show; one says it all, as the programs agree or are named."""
        judge = self._adapter_fault if self.format in EXACT_ADAPTERS else self._merge_fault
        return [fault for reading in self._independent if (fault := judge(reading))][:1]

    def _unproven(self) -> list[str]:
        if self._independent:
            return []
        reasons = "; ".join(f"{program}: {reason}" for program, reason in self.not_run.items())
        return [f"not verified: no other program opened it here ({reasons})"]

    @property
    def _independent(self) -> list[Reading]:
        return [reading for reading in self.readings if not reading.is_ours]

    def _adapter_fault(self, reading: Reading) -> str | None:
        apart = quantile(reading.from_trained.relative, 0.95)
        if apart <= SAME_MODEL_P95:
            return None
        return (
            f"{reading.program}: 95 % of the positions are within {apart:.1e} of the trained model, and an adapter is "
            f"to be within {SAME_MODEL_P95:.0e}: export again"
        )

    def _merge_fault(self, reading: Reading) -> str | None:
        fault = fidelity_fault(self.base, reading.from_trained, self.min_fidelity, noise=reading.noise)
        return fault and f"{reading.program}: {fault}: {self.cure}"

    def _farthest(self, count: int = 3) -> list[str]:
        """The positions that are farthest from the trained model for the first reader."""
        if not self.readings:
            return []
        reading, base = self.readings[0].from_trained, self.base
        order = reading.kl_nats.argsort(descending=True)[:count].tolist()
        return [
            f"{self.places[p]}: KL {reading.kl_nats[p]:.1e}, relative {reading.relative[p]:.1e} "
            f"(base {base.kl_nats[p]:.1e}, {base.relative[p]:.1e})"
            for p in order
        ]


_HEADINGS = "".join(f"{heading:>10}" for heading in ("median", "95 %", "max", "mean"))


def _bound(kind: Kind) -> str:
    return "known by hash" if isinf(WEIGHT_BOUNDS[kind]) else f"bound {WEIGHT_BOUNDS[kind]:.2g}"


def _line(label: str, distances: Distances) -> str:
    summary = distances.summary()
    *numbers, same_top = summary.values()
    return f"  {label:24}" + "".join(f"{number:10.1e}" for number in numbers) + f"{same_top:8.1%}"
