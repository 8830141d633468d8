"""merge.json: what was merged into which base, how each weight was written, and what that keeps of the training.

It lies in the exported folder, where loaders pass over it, and in the run folder.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from gptoss_ft.config.values import Rounding
from gptoss_ft.errors import UserError
from gptoss_ft.export.cures import Limits
from gptoss_ft.export.deltas import LowRankDelta
from gptoss_ft.export.distance import finite, quantile
from gptoss_ft.export.fidelity import Fidelity
from gptoss_ft.export.fingerprint import base_fingerprint, check_fingerprint
from gptoss_ft.export.merge import MERGE_FILE, MergeReport
from gptoss_ft.export.verdict import ARITHMETIC_NOISE
from gptoss_ft.kernels.merging import DITHER_RULE
from gptoss_ft.model.checkpoint import Checkpoint

Merged = list[dict[str, str]]
"""Base and adapter of every merge that led to a folder, the first one first."""


def adapter_digest(deltas: Mapping[str, LowRankDelta]) -> str:
    """A sha256 of all updates, however their files are named or ordered."""
    digest = sha256()
    for name, delta in sorted(deltas.items()):
        digest.update(f"{name} {delta.scaling!r}".encode())
        for factor in (delta.A, delta.B):
            digest.update(factor.float().contiguous().numpy().data)
    return digest.hexdigest()


def merged_into(folder: Path) -> Merged:
    """What a model's folder says was merged into it; nothing of one without merge.json.

    Raises:
        UserError: if its merge.json is damaged.
    """
    file = folder / MERGE_FILE
    if not file.is_file():
        return []
    try:
        return [
            {key: str(step[key]) for key in ("base", "adapter")} for step in json.loads(file.read_bytes())["merged"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged: remove it to use {folder} whatever it holds") from error


@dataclass(frozen=True)
class Noted:
    """What an export says that it wrote where base and adapter do not tell.

    Attributes:
        limits: of calibrated rounding; None where the export was not asked for that, or does not say.
        rounding: how its MXFP4 experts were rounded, see `MergeReport`; None where it has none or does not say.
        experts: `packed_digest` by HF weight name and expert.
        corrected: `tensor_digest` by HF name of other tensors, as their file gives them.
        asked_calibrated: it was asked for `rounding=calibrated`, whatever came of that.
    """

    experts: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    corrected: Mapping[str, str] = field(default_factory=dict)
    rounding: str | None = None
    asked_calibrated: bool = False
    limits: Limits | None = None

    @property
    def asked_for(self) -> Rounding:
        """What `rounding=` was."""
        if self.rounding == DITHER_RULE:
            return Rounding.dithered
        return Rounding.calibrated if self.asked_calibrated else Rounding.nearest


def noted_in(export: Path) -> Noted:
    """What the merge.json of an export says; nothing where there is none.

    Raises:
        UserError: if its merge.json is damaged.
    """
    file = export / MERGE_FILE
    if not file.is_file():
        return Noted()
    try:
        record = json.loads(file.read_bytes())
        recorded = record["calibrated_experts"]
        experts = {name: {int(e): str(digest) for e, digest in digests.items()} for name, digests in recorded.items()}
        # Before attention was corrected too, the key was another.
        digests = record["corrected_tensors"] if "corrected_tensors" in record else record["corrected_biases"]
        corrected = {name: str(digest) for name, digest in digests.items()}
        # Where all experts had too few inputs, that alone says what was asked for.
        asked_calibrated = bool(experts) or record.get("experts_with_few_inputs") is not None
        limits = record.get("limits_of_calibration")
        return Noted(experts, corrected, record.get("rounding"), asked_calibrated, limits and Limits(**limits))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged: export again") from error


def check_dithered(noted: Noted, base: Checkpoint, export: Path) -> None:
    """Tell whether what a dithered export should hold can be computed here; of others nothing is asked.

    Raises:
        UserError: if it was dithered by another rule than this version's, or the base is not packed.
    """
    if not (noted.rounding or "").startswith("dithered"):
        return
    if noted.rounding != DITHER_RULE:
        raise UserError(
            f"{export} was rounded by the rule {noted.rounding!r} ({MERGE_FILE} says so), and this version of "
            f"gptoss-ft knows {DITHER_RULE!r} alone: verify it with the version that wrote it, or export again"
        )
    if base.layout == "bf16":
        raise UserError(
            f"{base.path} holds bf16 experts, and {export} was dithered from packed ones: name that base with "
            "base=FOLDER"
        )


def holds_already(base: Checkpoint, adapter: str) -> bool:
    """Whether the adapter with this digest was merged into the base before."""
    return any(step["adapter"] == adapter for step in merged_into(base.path))


def check_base_of_merge(run: Path, export: Path, base: Checkpoint) -> None:
    """Compare a base with the one that an export was merged into, and that with the run's.

    Raises:
        UserError: if it is another one, or not what the run trained on; that may be so where the export added the run's
            update to a base that held it already.
    """
    merged = merged_into(export)
    if merged and merged[-1]["base"] != base_fingerprint(base):
        raise UserError(
            f"{export} was merged into another base than {base.path} ({MERGE_FILE} says so): name that one with "
            "base=FOLDER"
        )
    if not merged or not holds_already(base, merged[-1]["adapter"]):
        check_fingerprint(run, base)


def merge_record(base: Checkpoint, adapter: str, report: MergeReport, fidelity: Fidelity | None) -> dict[str, Any]:
    """For JSON."""
    content = report.to_dict()
    if fidelity:
        for name, tensor in content["tensors"].items():
            if name in fidelity.output_errors:
                tensor["held_out_output_error"] = fidelity.output_errors[name].relative
    merged = [*merged_into(base.path), {"base": base_fingerprint(base), "adapter": adapter}]
    return finite({"merged": merged, **content, "fidelity": fidelity and fidelity.to_dict()})


def as_table(report: MergeReport, fidelity: Fidelity | None) -> str:
    """Every layer and every updated weight on a line."""
    lines = [str(report)]
    if fidelity:
        lines += [
            str(fidelity),
            "",
            "outputs of decoder layers, distance from the trained model's",
            f"{'layer':>6}{'export':>10}{'base':>10}",
            *(f"{number:6}{d.exported:10.1e}{d.base:10.1e}" for number, d in enumerate(fidelity.layers)),
        ]
    lines += [
        "",
        "updates: size, share of numbers changed, share retained, error, error of outputs on held-out rows",
        *(
            f"{stats.relative_update:9.2%}{stats.changed_share:8.1%}{_share(stats.retained)}"
            f"{_share(stats.relative_error)}{_share(_output_error(fidelity, name))}  {name}"
            for name, stats in report.updates.items()
        ),
    ]
    return "\n".join(lines) + "\n"


def effect_note(fidelity: Fidelity) -> str | None:
    """A warning where the training changed less than a server's arithmetic does."""
    effect = quantile(fidelity.base.relative, 0.5)
    if effect > ARITHMETIC_NOISE:
        return None
    return (
        f"the training moves the logits by {effect:.1e} on these rows, less than the arithmetic of servers does "
        f"({ARITHMETIC_NOISE:.0e}): what the export keeps of that is not judged"
    )


def _output_error(fidelity: Fidelity | None, name: str) -> float | None:
    found = fidelity.output_errors.get(name) if fidelity else None
    return found.relative if found else None


def _share(value: float | None) -> str:
    return f"{'-':>9}" if value is None else f"{value:9.1%}"
