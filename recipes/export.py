"""From a finished run to a folder that a server loads."""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import count
from pathlib import Path
from random import Random
from typing import Literal, cast

from gptoss_ft.adapters.save import load_adapter
from gptoss_ft.config.catalog import rows_fault
from gptoss_ft.config.commands import ExportCommand
from gptoss_ft.config.load import compose_train_config
from gptoss_ft.config.schema import TrainConfig
from gptoss_ft.config.values import MIN_FIDELITY, Rounding
from gptoss_ft.data.sample import Sample
from gptoss_ft.errors import UserError
from gptoss_ft.export.absorb import RULES as ABSORB_RULES
from gptoss_ft.export.adapter import export_adapter, read_adapter
from gptoss_ft.export.calibrate import Calibration, is_selected
from gptoss_ft.export.cures import cure
from gptoss_ft.export.deltas import LowRankDelta, update_experts
from gptoss_ft.export.excerpts import Excerpt, select_positions
from gptoss_ft.export.fidelity import measure_fidelity
from gptoss_ft.export.fingerprint import base_fingerprint, check_fingerprint
from gptoss_ft.export.gguf_adapter import export_adapter_gguf
from gptoss_ft.export.gguf_layout import q8_0_weights
from gptoss_ft.export.journal import Journal, digest, remove_journals
from gptoss_ft.export.merge import MERGE_FILE, MergeFormat, MergeReport, merge
from gptoss_ft.export.merge_record import adapter_digest, as_table, effect_note, holds_already, merge_record
from gptoss_ft.export.paired import RULES as PAIRED_RULES
from gptoss_ft.export.sglang_adapter import export_adapter_sglang
from gptoss_ft.export.stored_model import Stored
from gptoss_ft.export.verdict import fidelity_fault
from gptoss_ft.export.verify import open_export
from gptoss_ft.export.vllm_adapter import export_adapter_vllm, max_lora_rank
from gptoss_ft.files import refuse_existing, refuse_other_writers, write_whole
from gptoss_ft.kernels.merging import DITHER_RULE
from gptoss_ft.model.checkpoint import Checkpoint
from gptoss_ft.model.load import load_base
from gptoss_ft.model.manifest import add_to_manifest
from gptoss_ft.model.spec import GptOssSpec
from gptoss_ft.mxfp4.calibrated import RULES as ROUNDING_RULES
from gptoss_ft.recipes.machine import check_variables
from gptoss_ft.recipes.samples import rows_to_compare, split_samples
from gptoss_ft.training.run_folder import RunFolder, write_json

# Those whose next token carries loss; the logits of one are 0.8 MB for each of three models.
FIDELITY_POSITIONS = 256

# Errors at tokens of a prompt reach what is emitted through attention alone. Where they counted in full, an update of
# 1 % kept 60 % of its gain in loss, not 69 %, and the mean KL was a quarter larger: on the held-out rows by which it
# was chosen, with one seed of a tiny model (benchmarks/merge_aware.py).
PROMPT_WEIGHT = 0.1

ADAPTER_FORMATS: dict[str, Callable[[Path, Path, Checkpoint], Path]] = {
    "adapter": export_adapter,
    "adapter_vllm": export_adapter_vllm,
    "adapter_sglang": export_adapter_sglang,
    "adapter_gguf": export_adapter_gguf,
}


def main(cfg: ExportCommand) -> Path:
    """Run `gptoss-ft export`; returns the exported folder."""
    check_variables()
    return export_run(
        Path(cfg.run),
        cfg.format.value,
        Path(cfg.out),
        base=Path(cfg.base) if cfg.base else None,
        dithered=cfg.rounding is Rounding.dithered,
        calibrated=_calibrated(cfg) if cfg.rounding is Rounding.calibrated else None,
        fidelity_tokens=cfg.fidelity_tokens,
        min_fidelity=cfg.min_fidelity,
        data=Path(cfg.data) if cfg.data else None,
        merged_base=cfg.merged_base,
    )


@dataclass(frozen=True)
class Calibrated:
    """How to round MXFP4 experts for what they see in the run's training rows.

    Attributes:
        num_tokens: of at most so many tokens.
        layers, experts: only experts of these numbers; the others are rounded to nearest. None stands for all.
    """

    num_tokens: int
    layers: frozenset[int] | None = None
    experts: frozenset[int] | None = None


def _calibrated(cfg: ExportCommand) -> Calibrated:
    layers, experts = (None if chosen is None else frozenset(chosen) for chosen in (cfg.layers, cfg.experts))
    return Calibrated(cfg.calibration_tokens, layers, experts)


def export_run(
    run_path: Path,
    format: str,
    out: Path,
    *,
    base: Path | None = None,
    dithered: bool = False,
    calibrated: Calibrated | None = None,
    fidelity_tokens: int = 0,
    min_fidelity: float = MIN_FIDELITY,
    data: Path | None = None,
    merged_base: bool = False,
) -> Path:
    """Export a run's adapter, alone or merged into its base; a merge is recorded in the run folder.

    Args:
        format: a name of `ExportFormat`.
        base: the base checkpoint, if it is no longer where the run's config says.
        dithered: round MXFP4 experts by a threshold of each element, as merge-aware runs do in any case.
        calibrated: round them for their inputs; by neither they are rounded to nearest. What an interrupted export
            rounded for its inputs is kept beside `out`, and the same export goes on there.
        fidelity_tokens: measure what a merged model keeps of the training on at most so many tokens of held-out rows;
            0 does not.
        min_fidelity: refuse one that keeps less, see `distance.fidelity`; 0 takes any.
        data: rows to measure on; None takes those that the run held out, or its training rows if it held out none.
        merged_base: merge even into a base that holds this run's adapter already.

    Raises:
        UserError: if the base is not the one that the run trained on, or the adapter or `out` cannot be used; if the
            run's rows or base cannot be calibrated on or measured; if the merged model keeps too little, which then
            lies beside `out`, see `rejected_path`.
    """
    run = RunFolder(run_path)
    cfg = config_of(run)
    if cfg.adapter.qat:
        check_merged_export(run, format, calibrated=calibrated is not None)
    checkpoint = base_of(run, cfg, base)
    deltas = read_adapter(run.adapter, checkpoint.spec)
    adapter = adapter_digest(deltas)
    if not holds_already(checkpoint, adapter):
        check_fingerprint(run.path, checkpoint)
    elif not merged_base:
        raise UserError(
            f"{checkpoint.path} holds the update of {run.path} already ({MERGE_FILE} says so): name the base that was "
            "trained on, or have the update twice with merged_base=true"
        )
    if format in ADAPTER_FORMATS:
        ADAPTER_FORMATS[format](run.adapter, out, checkpoint)
        if format == "adapter_vllm":
            print(f"serve it with vllm serve BASE --enable-lora --max-lora-rank {max_lora_rank(out)}")
        return out
    if dithered:
        check_packed(checkpoint, Rounding.dithered)
    rounding = Rounding.dithered if dithered else Rounding.calibrated if calibrated else Rounding.nearest
    calibrate = None if calibrated is None else calibration(run, checkpoint, deltas, calibrated, out, format)
    excerpts = fidelity_excerpts(cfg, data, fidelity_tokens) if fidelity_tokens else []

    def check(folder: Path, report: MergeReport) -> None:
        print(report)
        fidelity, fault = None, None
        if excerpts:
            _, merged = open_export(checkpoint, folder)
            fidelity = measure_fidelity(
                checkpoint, run.adapter, deltas, cast(Stored, merged), excerpts, merged_training=cfg.adapter.qat
            )
            fault = fidelity_fault(fidelity.base, fidelity.exported, min_fidelity)
            print(fidelity, *filter(None, [effect_note(fidelity)]), sep="\n")
        else:
            print("fidelity_tokens=0: what the export keeps of the training was not measured")
        record = merge_record(checkpoint, adapter, report, fidelity)
        write_json(folder / MERGE_FILE, record)
        add_to_manifest(folder, MERGE_FILE)
        place = rejected_path(out) if fault else out
        if fault:
            folder.rename(place)
        file = record_path(run, "merge", format, place)
        write_json(file, record)
        write_whole(file.with_suffix(".txt"), as_table(report, fidelity))
        if fault:
            instead = cure(
                format,
                packed_base=checkpoint.layout != "bf16",
                trains_experts=update_experts(deltas),
                rounding=rounding,
                limits=calibrate.limits if calibrate else None,
                merged_training=cfg.adapter.qat,
            )
            raise UserError(
                f"{out} was not written, {fault}: {instead}; or take the files as they are from {place}, "
                "where they were left (min_fidelity=0 writes them to their place)" + _of_journal(calibrate)
            )

    merge(
        checkpoint,
        deltas,
        out,
        format=cast(MergeFormat, format),
        calibrate=calibrate,
        dithered=dithered,
        merged_training=cfg.adapter.qat,
        check=check,
    )
    remove_journals(out)
    return out


def base_of(run: RunFolder, cfg: TrainConfig, base: Path | None) -> Checkpoint:
    """The checkpoint at `base`, or where the run's config says, if it has the experts that the run needs.

    Raises:
        UserError: if it is no whole checkpoint, or holds bf16 experts where training rounded packed ones, or did so by
            another rule than this version's.
    """
    checkpoint = Checkpoint.open(base or cfg.model.path)
    if cfg.adapter.qat:
        check_trained_rounding(run)
    if cfg.adapter.qat and checkpoint.layout == "bf16":
        raise UserError(
            f"{checkpoint.path} holds bf16 experts, and {run.path} was trained through the rounding of its packed base "
            "(adapter.qat=true): name that one with base=FOLDER"
        )
    return checkpoint


def check_merged_export(run: RunFolder, format: str, *, calibrated: bool) -> None:
    """Refuse what a run that trained through the rounding of its merge has no use for.

    Raises:
        UserError: for an adapter by itself, and for another rounding than the one that was trained through.
    """
    trained = f"{run.path} was trained through the rounding of its merge (adapter.qat=true)"
    if format in ADAPTER_FORMATS:
        raise UserError(
            f"{trained}: beside a base that is not rounded, its adapter is another model than the trained one. "
            "Export a merged one, such as format=mxfp4"
        )
    if calibrated:
        raise UserError(f"{trained}: rounding=calibrated would write another model. Leave rounding out")


def check_trained_rounding(run: RunFolder) -> None:
    """Compare the rule that a merge-aware run rounded by with this version's; says so if the run does not tell.

    Raises:
        UserError: if it is another one.
    """
    trained = run.trained_rounding()
    if trained is None:
        print(
            f"{run.path} has no {run.rounding.name}: it began before runs recorded the rule of rounding that they "
            f"train through. If that was another than this version's ({DITHER_RULE}), what is exported is not what was "
            "trained, and its held-out loss is not the one that training reported"
        )
    elif trained != DITHER_RULE:
        raise UserError(
            f"{run.path} was trained through the rounding {trained!r}, and this version of gptoss-ft rounds by "
            f"{DITHER_RULE!r}, which makes another model of it: use the version that {run.versions} names"
        )


def check_packed(base: Checkpoint, rounding: Rounding) -> None:
    """Refuse a base whose experts such rounding cannot start from.

    Raises:
        UserError: if they are bf16.
    """
    if base.layout == "bf16":
        raise UserError(
            f"{base.path} holds bf16 experts, and rounding={rounding} starts from the MXFP4 numbers of a base: "
            "name its MXFP4 checkpoint with base=FOLDER, or export with rounding=nearest"
        )


def fidelity_excerpts(cfg: TrainConfig, data: Path | None, num_tokens: int) -> list[Excerpt]:
    """What of the rows is run to measure a merged model."""
    samples = rows_to_compare(cfg.data, cfg.seed, data, otherwise=", or measure nothing: fidelity_tokens=0")
    return select_positions(samples, FIDELITY_POSITIONS, max_tokens=num_tokens)


def _of_journal(calibrate: Calibration | None) -> str:
    if calibrate is None or calibrate.journal is None:
        return ""
    folder = calibrate.journal.folder
    return f"; the rounded experts stay in {folder} for that, until an export succeeds there or rm -r removes them"


def rejected_path(out: Path) -> Path:
    """Where a merged model is left that keeps too little of the training for its place; nothing is there yet."""
    names = (f"{out.name}.rejected{'' if number == 1 else f'-{number}'}" for number in count(1))
    return next(place for name in names if not os.path.lexists(place := out.with_name(name)))


def calibration(
    run: RunFolder, base: Checkpoint, deltas: Mapping[str, LowRankDelta], chosen: Calibrated, out: Path, format: str
) -> Calibration:
    """Load the trained model; says on how much of its training rows it calibrates, and how much is already done.

    Raises:
        UserError: if there is nothing to calibrate or nothing to do it on, or `out` exists or is being written.
    """
    check_packed(base, Rounding.calibrated)
    spec = base.spec
    for name, numbers, total in (
        ("layers", chosen.layers, spec.num_hidden_layers),
        ("experts", chosen.experts, spec.num_local_experts),
    ):
        if unknown := sorted(number for number in numbers or () if number >= total):
            raise UserError(f"{name}={unknown}: {base.path} has {name} 0 to {total - 1}")
    refuse_existing(out)
    refuse_other_writers(out)
    samples, all_rows = calibration_samples(config_of(run), chosen.num_tokens)
    q8_0 = q8_0_weights(spec, format)
    ids, weights = [sample.input_ids for sample in samples], token_weights(samples)
    journal = Journal(out, rounding_key(base, deltas, [*ids, *weights], chosen, q8_0))
    if journal.num_weights:
        print(f"going on with {journal.num_weights} expert weights that an interrupted export has rounded")
    model, _ = load_adapter(load_base(base.path), run.adapter)
    print(f"calibrating on {sum(map(len, ids))} tokens of {len(samples)} samples")
    return Calibration(
        model,
        base,
        deltas,
        ids,
        layers=chosen.layers,
        experts=chosen.experts,
        journal=journal,
        num_elements=num_elements(deltas, spec, chosen),
        q8_0=q8_0,
        weights=weights,
        all_rows=all_rows,
    )


def token_weights(samples: list[Sample]) -> list[list[float]]:
    """How much each token counts that is calibrated on: fully where the next one is what the model emits."""
    return [[1.0 if weight else PROMPT_WEIGHT for weight in (*sample.loss_weights[1:], 0.0)] for sample in samples]


def rounding_key(
    base: Checkpoint,
    deltas: Mapping[str, LowRankDelta],
    samples: Sequence[Sequence[float]],
    chosen: Calibrated,
    q8_0: Collection[str] = (),
) -> str:
    """A digest of all that decides what calibrated rounding makes of each expert.

    Which experts are chosen is part of it, and which other weights the file holds in 8 bits: those after them are
    rounded for what they leave.
    """
    places = [None if numbers is None else sorted(numbers) for numbers in (chosen.layers, chosen.experts)]
    rules = [ROUNDING_RULES, PAIRED_RULES, ABSORB_RULES, sorted(q8_0)]
    return digest([base_fingerprint(base), adapter_digest(deltas), *rules, samples, places])


def num_elements(deltas: Mapping[str, LowRankDelta], spec: GptOssSpec, chosen: Calibrated) -> int:
    """How many weights of experts are to be rounded for their inputs."""
    total = 0
    for layer in range(spec.num_hidden_layers):
        for projection, (rows, columns) in spec.expert_shapes().items():
            delta = deltas.get(f"model.layers.{layer}.mlp.experts.{projection}")
            for expert in range(spec.num_local_experts):
                wanted = is_selected(layer, expert, chosen.layers, chosen.experts)
                total += rows * columns * bool(delta and wanted and delta.factors(expert))
    return total


def calibration_samples(cfg: TrainConfig, num_tokens: int) -> tuple[list[Sample], bool]:
    """Whole training samples, drawn by the run's seed, of at most `num_tokens` tokens; whether they are all."""
    for path in cfg.data.path:
        if fault := rows_fault(path):
            raise UserError(f"{path}: {fault}; rounding=calibrated needs the run's training rows where they were")
    train, _, _ = split_samples(replace(cfg.data, eval_path=None), cfg.seed)
    order = list(range(len(train)))
    Random(cfg.seed).shuffle(order)
    lengths = train.lengths
    chosen: list[Sample] = []
    remaining = num_tokens
    for place in order:
        if lengths[place] <= remaining:
            chosen.append(train[place])
            remaining -= int(lengths[place])
    if not chosen:
        shortest = lengths.min()
        raise UserError(f"the shortest training sample has {shortest} tokens: set calibration_tokens to that at least")
    return chosen, len(chosen) == len(train)


def config_of(run: RunFolder) -> TrainConfig:
    """The config that a run was started with; the files it names need not exist any more."""
    if not run.config.is_file():
        raise UserError(f"{run.path} has no {run.config.name}: it is not the folder of a training run")
    return compose_train_config([f"config={run.config}"])


def record_path(run: RunFolder, kind: Literal["merge", "verify"], format: str, export: Path) -> Path:
    """The file in the run folder that says how an export was merged or verified; no two exports share one.

    `merge-mxfp4.json` is of the run's own `export/mxfp4`. A folder elsewhere adds its name and the start of a sha256
    of its absolute path: `merge-mxfp4-NAME-1f2e3d4c.json`.
    """
    export = export.resolve()
    if export == (run.exports / format).resolve():
        return run.path / f"{kind}-{format}.json"
    digest = sha256(os.fsencode(export)).hexdigest()[:8]
    return run.path / f"{kind}-{format}-{export.name}-{digest}.json"
