"""Add low-rank updates to a checkpoint and write it, expert by expert, in the layout that a program reads."""

import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from gguf import GGMLQuantizationType

from gptoss_ft.export.cures import Limits
from gptoss_ft.export.deltas import LowRankDelta, check_deltas
from gptoss_ft.export.finite import check_rewritten
from gptoss_ft.export.gguf_layout import MODEL_FILE, GgufFormat, check_representable, gguf_tensors, q8_0_weights
from gptoss_ft.export.gguf_model import write_model
from gptoss_ft.export.merged import Calibrate, MergedWeights, row_workers, tensor_digest
from gptoss_ft.files import whole_folder
from gptoss_ft.kernels.merging import DITHER_RULE
from gptoss_ft.model.checkpoint import Checkpoint
from gptoss_ft.model.experts import PROJECTIONS
from gptoss_ft.model.manifest import Manifest
from gptoss_ft.model.shards import write_shards
from gptoss_ft.model.spec import QUANTIZATION_CONFIG, SPECS, GptOssSpec, Layout, config_as_text
from gptoss_ft.model.tokenizer import TOKENIZER_FILES, write_tokenizer_files
from gptoss_ft.mxfp4.calibrated import MIN_INPUTS
from gptoss_ft.mxfp4.round import UpdateStats

MergeFormat = Literal["bf16", "mxfp4", "original", "gguf", "gguf_q8_0"]

# A relative error near 1 means that what was written is as far from the updated weight as the base is.
LOST = 0.95
# The record of a merge, see `merge_record`.
MERGE_FILE = "merge.json"


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        updates: by HF weight name, over the experts that have an update, how it compares with what was written;
            also every expert stack that had to be rounded from bf16 to MXFP4.
        num_copied: tensors whose bytes are the base's.
        num_calibrated, num_nearest: weights of experts of packed stacks that were rounded for their inputs and to
            nearest; neither counts dithered ones.
        few_inputs: experts by HF weight name that would be among the former, had they more inputs; None if none was
            to be.
        merged_training: training computed with the rounded weights, so that nothing is lost by rounding them.
        calibrated: `packed_digest` of the calibrated experts by HF weight name and number: no bound for single blocks
            holds there.
        corrected: `tensor_digest` by HF name of what calibration corrected for the sake of outputs: biases of experts,
            weights and biases of attention and routers.
        rounding: how MXFP4 experts were rounded: "nearest", "calibrated", "calibrated and nearest" or the name of the
            rule that dithered them; None if the format has none.
    """

    format: MergeFormat
    updates: dict[str, UpdateStats]
    num_copied: int
    num_calibrated: int = 0
    num_nearest: int = 0
    merged_training: bool = False
    calibrated: dict[str, dict[int, str]] = field(default_factory=dict)
    corrected: dict[str, str] = field(default_factory=dict)
    rounding: str | None = None
    few_inputs: dict[str, list[int]] | None = None
    limits: Limits | None = None

    def __str__(self) -> str:
        total = sum(self.updates.values(), UpdateStats())
        lines = [f"{self.format}: {len(self.updates)} weights written anew, {self.num_copied} tensors copied"]
        if self.merged_training:
            lines.append("rounded as in training: what was written is what was trained")
            return "\n".join(lines)
        if total.update_sq:
            lines.append(
                f"updates of {total.relative_update:.2%} of the weights' norm: {total.retained:.1%} retained, "
                f"error {total.relative_error:.1%} of the update"
            )
        if total.output_error is not None:
            lines.append(
                f"{self.num_calibrated} of {self.num_calibrated + self.num_nearest} weights of trained experts rounded "
                f"for their inputs: on held-out ones their outputs are off by {total.output_error:.1%} of what the "
                "base's are"
            )
        elif self.few_inputs is not None and not self.num_nearest:
            lines.append("no expert has an update: rounding=calibrated had nothing to round")
        elif self.few_inputs is not None:
            lines.append(f"none of {self.num_nearest} weights of trained experts was rounded for its inputs")
        if self.num_nearest and self.few_inputs is not None:
            lines.append(self._rounded_to_nearest(self.few_inputs))
        if num_others := sum(".experts." not in name for name in self.corrected):
            lines.append(
                f"{num_others} weights and biases of attention and routers corrected for what rounding left before them"
            )
        dithered = [name for name in self.updates if self.rounding == DITHER_RULE and name.endswith(PROJECTIONS)]
        if dithered:
            lines.append(
                f"{len(dithered)} weights of experts are dithered: what they err by is noise, of a mean near zero, and "
                "the outputs on held-out rows say how much it matters"
            )
        lost = [name for name, stats in self.updates.items() if name not in dithered and _error(stats) > LOST]
        if lost:
            lines.append(
                f"{len(lost)} of {len(self.updates)} updates are too small for {self.format} and lost in rounding, "
                f"first {lost[0]}: serve the adapter instead"
            )
        return "\n".join(lines)

    def _rounded_to_nearest(self, few_inputs: dict[str, list[int]]) -> str:
        """Why some weights of experts were, in a calibrated merge."""
        by_layer = Counter[str]()
        for name, experts in few_inputs.items():
            by_layer[name.split(".")[2]] += len(experts)
        reasons = []
        if by_layer:
            layers = ", ".join(f"{count} in layer {layer}" for layer, count in by_layer.items())
            num_few = by_layer.total()
            has_more = self.limits is None or not self.limits.all_rows
            cure = ": raise calibration_tokens" if has_more else " of all training rows"
            reasons.append(f"{num_few} had fewer than {MIN_INPUTS} inputs ({layers}){cure}")
        if num_others := self.num_nearest - by_layer.total():
            reasons.append(f"{num_others} are not among the chosen layers and experts")
        return f"{self.num_nearest} weights of experts were rounded to nearest: {'; '.join(reasons)}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "format": self.format,
            "merged_training": self.merged_training,
            "rounding": self.rounding,
            "num_tensors_copied": self.num_copied,
            "num_weights_calibrated": self.num_calibrated,
            "num_weights_to_nearest": self.num_nearest,
            "experts_with_few_inputs": self.few_inputs,
            "limits_of_calibration": self.limits and asdict(self.limits),
            "calibrated_experts": {
                name: {str(expert): digest for expert, digest in digests.items()}
                for name, digests in self.calibrated.items()
            },
            "corrected_tensors": self.corrected,
            "overall": _as_dict(sum(self.updates.values(), UpdateStats())),
            "tensors": {name: _as_dict(stats) for name, stats in self.updates.items()},
        }


Check = Callable[[Path, MergeReport], None]


def merge(
    base: Checkpoint,
    deltas: Mapping[str, LowRankDelta],
    out: Path,
    *,
    format: MergeFormat,
    calibrate: Calibrate | None = None,
    dithered: bool = False,
    merged_training: bool = False,
    check: Check | None = None,
    progress: bool = True,
) -> MergeReport:
    """Write base + deltas to the new folder `out`.

    Whatever has no update keeps its bytes where the format allows. bf16 weights are rounded to nearest; MXFP4 experts
    as `merge_mxfp4` describes, or with `calibrate` for their inputs, see `MergedWeights`: their biases and attention
    change too then. config.json is the base's, with what the format needs changed. The GGUF formats are one file,
    `model.gguf`.

    Args:
        deltas: by HF weight name: `….self_attn.q_proj.weight`, `….mlp.router.weight`, `….mlp.experts.gate_up_proj`.
        dithered: experts of a packed base are rounded by `merge_mxfp4_dithered`, where the format has MXFP4 ones.
        merged_training: training computed with experts rounded so: they are in every format.
        check: called with the finished folder before it has its name, and the report; what it raises leaves no `out`.

    Raises:
        UserError: if a delta is for no weight of the base, of another shape or not finite; if a weight that is written
            anew is not finite; if the format cannot hold the model; if `out` exists or its disk is too small. Nothing
            is left behind.
    """
    check_deltas(base.spec, deltas)
    check_rewritten(base, deltas, format)
    with whole_folder(out, num_bytes=_num_bytes(base.spec, format)) as folder:
        with row_workers() as pool:
            q8_0 = q8_0_weights(base.spec, format)
            weights = MergedWeights(
                base, deltas, pool, calibrate, dithered=dithered, merged_training=merged_training, q8_0=q8_0
            )
            if format == "gguf" or format == "gguf_q8_0":
                num_copied = _write_gguf(weights, folder, format, progress)
            else:
                num_copied = _write_checkpoint(weights, folder, format, progress)
        report = MergeReport(
            format,
            weights.updates,
            num_copied,
            weights.num_calibrated,
            weights.num_nearest,
            merged_training,
            weights.calibrated,
            {name: tensor_digest(bias) for name, bias in weights.biases.items()} | weights.corrected,
            _rounding(format, weights),
            calibrate.few_inputs if calibrate else None,
            calibrate.limits if calibrate else None,
        )
        if check:
            check(folder, report)
    return report


def copy_tokenizer(base: Checkpoint, folder: Path) -> None:
    """Write the base's tokenizer files, and where it has none the published ones if its vocabulary is that large."""
    present = [name for name in TOKENIZER_FILES if (base.path / name).is_file()]
    if "tokenizer.json" not in present and base.spec.vocab_size == SPECS["gpt_oss_20b"].vocab_size:
        write_tokenizer_files(folder)
    for name in present:
        shutil.copyfile(base.path / name, folder / name)


def _num_bytes(spec: GptOssSpec, format: MergeFormat) -> int:
    """Size of the weights, once the format is known to hold such a model."""
    if format == "gguf" or format == "gguf_q8_0":
        check_representable(spec)
        return sum(part.nbytes for parts in gguf_tensors(spec, format).values() for part in parts)
    return spec.num_bytes(format)


def _write_checkpoint(weights: MergedWeights, folder: Path, format: Layout, progress: bool) -> int:
    """Returns how many tensors were copied, as `_write_gguf` does."""
    base = weights.base
    (folder / "config.json").write_bytes(_config(base, format))
    if format != "original":
        copy_tokenizer(base, folder)
    manifest = Manifest(folder)
    write_shards(folder, weights.entries(format), open_file=manifest.open, progress=progress)
    manifest.write(format)
    return sum(map(weights.is_copied, base.spec.tensors("bf16" if format == "bf16" else "mxfp4")))


def _write_gguf(weights: MergedWeights, folder: Path, format: GgufFormat, progress: bool) -> int:
    base, manifest = weights.base, Manifest(folder)
    with TemporaryDirectory() as tokenizer:
        copy_tokenizer(base, Path(tokenizer))
        write_model(manifest.open(folder / MODEL_FILE), weights, format, Path(tokenizer), progress=progress)
        manifest.write(format)
    rounded = {GGMLQuantizationType.Q8_0} | ({GGMLQuantizationType.MXFP4} if base.layout == "bf16" else set())
    tensors = gguf_tensors(base.spec, format)
    changed = weights.deltas.keys() | weights.biases.keys() | weights.corrected.keys()
    return sum(name not in changed and parts[0].type not in rounded for name, parts in tensors.items())


def _config(base: Checkpoint, format: Layout) -> bytes:
    if base.layout == format:
        return (base.path / "config.json").read_bytes()
    if "original" in (base.layout, format):
        return base.spec.config_text(format).encode()
    config = {key: value for key, value in base.config.items() if key != "quantization_config"}
    if format == "mxfp4":
        config["quantization_config"] = QUANTIZATION_CONFIG
    return config_as_text(config).encode()


def _rounding(format: MergeFormat, weights: MergedWeights) -> str | None:
    if format == "bf16" and not weights.merged_training:
        return None
    if weights.dithered and weights.packed:
        return DITHER_RULE
    if not weights.num_calibrated:
        return "nearest"
    return "calibrated and nearest" if weights.num_nearest else "calibrated"


def _error(stats: UpdateStats) -> float:
    """Relative to the update, and of its outputs where they were looked at: calibrated elements err more on purpose."""
    return next((error for error in (stats.output_error, stats.relative_error) if error is not None), 0.0)


def _as_dict(stats: UpdateStats) -> dict[str, Any]:
    return {
        "relative_update": stats.relative_update,
        "changed_share": stats.changed_share,
        "retained": stats.retained,
        "relative_error": stats.relative_error,
        "output_error": stats.output_error,
        "rounding_error": stats.rounding_error,
        "num_elements": stats.num_elements,
    }
