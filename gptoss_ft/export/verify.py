"""Open an export with other programs and measure how far it is from the trained model.

Three questions, since none of them answers the others: does the file hold the trained weights (every block of them),
does it mean the same to every reader, and does what the readers compute keep the training's effect on real rows?
P positions · V vocabulary
"""

import filecmp
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from gptoss_ft.adapters.merged import compute_merged
from gptoss_ft.adapters.peft_files import CONFIG_FILE
from gptoss_ft.adapters.save import load_adapter
from gptoss_ft.config.values import MIN_FIDELITY
from gptoss_ft.data.sample import Sample
from gptoss_ft.errors import UserError
from gptoss_ft.export.adapter import read_adapter
from gptoss_ft.export.cures import cure
from gptoss_ft.export.deltas import LowRankDelta, update_experts
from gptoss_ft.export.distance import Distances
from gptoss_ft.export.excerpts import Excerpt, select_positions
from gptoss_ft.export.gguf_adapter import read_adapter_gguf
from gptoss_ft.export.gguf_layout import ADAPTER_FILE, MODEL_FILE
from gptoss_ft.export.gguf_read import GgufModel
from gptoss_ft.export.gpt_oss_reader import open_with_gpt_oss
from gptoss_ft.export.llama_cpp import LlamaCpp, open_adapter_with_llama_cpp
from gptoss_ft.export.merge_record import Noted, check_dithered, noted_in
from gptoss_ft.export.readers import NotRun, Reader, Rows, load_for_reading, one_by_one, open_with_gptoss_ft, reader_of
from gptoss_ft.export.sglang_adapter import is_adapter_sglang, read_adapter_sglang
from gptoss_ft.export.transformers_reader import (
    open_sglang_adapter_with_peft,
    open_with_peft,
    open_with_transformers,
)
from gptoss_ft.export.verdict import ARITHMETIC_NOISE, LLAMA_CPP_NOISE, Reading, VerifyReport, WeightCheck
from gptoss_ft.export.weights import checkpoint_distances, delta_distances
from gptoss_ft.kernels.merging import DITHER_RULE
from gptoss_ft.model.checkpoint import Checkpoint
from gptoss_ft.model.manifest import check_hashes
from gptoss_ft.model.spec import ORIGINAL_KEYS

Format = Literal["adapter", "adapter_sglang", "adapter_gguf", "bf16", "mxfp4", "original", "gguf", "gguf_q8_0"]
Contents = Mapping[str, LowRankDelta] | Checkpoint | GgufModel
LLAMA_CPP = "llama-cpp-python"
# What a server needs beside the weights in HF names; an export has each that its base has.
COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def verify_export(
    *,
    base: Path,
    adapter: Path,
    export: Path,
    samples: Sequence[Sample],
    max_tokens: int,
    merged_training: bool = False,
    min_fidelity: float = MIN_FIDELITY,
    progress: bool = True,
) -> VerifyReport:
    """Compare an exported adapter or checkpoint with base + adapter, in fp32 on the CPU.

    Holds one decoder layer of a model at a time, and the logits of the compared positions twice (0.8 MB a position
    each). llama.cpp maps its file.

    Args:
        base: the checkpoint that was trained on.
        adapter: what training saved, in PEFT's layout.
        samples: rows to compare on, used from the first on.
        max_tokens: positions to compare at most, of those that carry loss.
        merged_training: the adapter was trained through the rounding of its merge, see `compute_merged`.
        min_fidelity: what a merged model has to keep, see `distance.fidelity`.
        progress: show a bar for every program on stderr.

    Raises:
        UserError: if the folder is no whole export of this base, no sample carries loss, or the memory does not
            suffice for the trained model.
    """
    base_checkpoint = Checkpoint.open(base)
    check_hashes(export, progress=progress)
    format, contents = open_export(base_checkpoint, export)
    excerpts = select_positions(samples, max_tokens)
    noted = noted_in(export)
    check_dithered(noted, base_checkpoint, export)
    deltas = read_adapter(adapter, base_checkpoint.spec)
    weights = check_weights(base_checkpoint, deltas, contents, noted, progress, merged_training=merged_training)
    trains_experts = update_experts(deltas)
    del contents, deltas
    trained_PV, base_distances = trained_logits(
        base_checkpoint, adapter, excerpts, progress, merged_training=merged_training
    )
    readings, not_run = read_export(base, export, format, excerpts, trained_PV, progress)
    return VerifyReport(
        export=export,
        format=format,
        places=[place for excerpt in excerpts for place in excerpt.places],
        base=base_distances,
        readings=readings,
        not_run=not_run,
        weights=weights,
        cure=cure(
            format,
            packed_base=base_checkpoint.layout != "bf16",
            trains_experts=trains_experts,
            rounding=noted.asked_for,
            limits=noted.limits,
            merged_training=merged_training,
        ),
        min_fidelity=min_fidelity,
    )


def open_export(base: Checkpoint, export: Path) -> tuple[Format, Contents]:
    """The format of an exported folder and what it holds, once it is known to be a whole one of this base.

    Raises:
        UserError: naming the file, key, tensor or size at fault.
    """
    if is_adapter_sglang(export):
        return "adapter_sglang", read_adapter_sglang(export, base.spec)
    if (export / CONFIG_FILE).is_file():
        return "adapter", read_adapter(export, base.spec)
    if (export / ADAPTER_FILE).is_file():
        return "adapter_gguf", read_adapter_gguf(export / ADAPTER_FILE, base.spec)
    if (export / MODEL_FILE).is_file():
        model = GgufModel(export / MODEL_FILE, base)
        return model.format, model
    checkpoint = Checkpoint.open(export)
    _check_sizes(base, checkpoint)
    if checkpoint.layout != "original":
        _check_companions(base, export)
    return checkpoint.layout, checkpoint


def _check_sizes(base: Checkpoint, export: Checkpoint) -> None:
    # The original config says less, and an HF one that was made from it says what it implies.
    names = ORIGINAL_KEYS.values() if export.layout == "original" else vars(base.spec)
    for name in names:
        if getattr(export.spec, name) != getattr(base.spec, name):
            raise UserError(
                f"{export.path / 'config.json'}: {name} is {getattr(export.spec, name)!r}, but the base has "
                f"{getattr(base.spec, name)!r}: it is no export of this run"
            )


def _check_companions(base: Checkpoint, export: Path) -> None:
    for name in COMPANIONS:
        if not (base.path / name).is_file():
            continue
        if not (export / name).is_file():
            raise UserError(f"{export} has no {name}: export again, or copy it from {base.path}")
        if not filecmp.cmp(base.path / name, export / name, shallow=False):
            raise UserError(f"{export / name} is not the base's: export again, or copy it from {base.path}")


def check_weights(
    base: Checkpoint,
    deltas: Mapping[str, LowRankDelta],
    contents: Contents,
    noted: Noted,
    progress: bool = False,
    *,
    merged_training: bool = False,
) -> WeightCheck:
    """Compare all weights, file with file; `deltas` are the adapter's updates, `noted` is what `noted_in` says."""
    distances = (
        checkpoint_distances(
            base,
            deltas,
            contents,
            noted.experts,
            dithered=noted.rounding == DITHER_RULE,
            merged_training=merged_training,
            corrected=noted.corrected,
        )
        if isinstance(contents, Checkpoint | GgufModel)
        else delta_distances(deltas, contents)
    )
    return WeightCheck.of(tqdm(distances, desc="comparing the files", unit=" weights", disable=not progress))


def trained_logits(
    base: Checkpoint,
    adapter: Path,
    excerpts: Sequence[Excerpt],
    progress: bool = False,
    *,
    merged_training: bool = False,
) -> tuple[Tensor, Distances]:
    """The trained model's logits `[P, V]`, and how far the base without the adapter is from them."""
    with _bar("the trained model", 2 * len(excerpts), progress) as bar:
        try:
            model, _ = load_adapter(load_for_reading(base), adapter)
            if merged_training:
                compute_merged(model)
        except NotRun as reason:
            raise UserError(f"not verified: the trained model cannot be opened here: {reason}") from reason
        reader, rows = reader_of(model), _rows(excerpts)
        trained = list(reader(rows, bar.update))
        with model.disable_adapter():
            distances = Distances.join(
                [Distances.between(*pair) for pair in zip(trained, reader(rows, bar.update), strict=True)]
            )
    return torch.cat(trained), distances


def read_export(
    base: Path,
    export: Path,
    format: Format,
    excerpts: Sequence[Excerpt],
    trained_PV: Tensor,
    progress: bool = False,
) -> tuple[list[Reading], dict[str, str]]:
    """What every reader that can open the export makes of it, and why the others cannot."""
    readings: list[Reading] = []
    not_run: dict[str, str] = {}
    first_PV: Tensor | None = None
    for program, open_export in _readers(base, export, format):
        with _bar(program, len(excerpts), progress) as bar:
            try:
                reader = open_export()
                logits_PV = torch.cat(list(reader(_rows(excerpts), bar.update)))
            except NotRun as reason:
                not_run[program] = str(reason)
                continue
            del reader
        from_first = None if first_PV is None else Distances.between(first_PV, logits_PV)
        readings.append(
            Reading(
                program=f"{program} {version(program)}",
                is_ours=program == "gptoss-ft",
                from_trained=Distances.between(trained_PV, logits_PV),
                from_first=from_first,
                noise=LLAMA_CPP_NOISE if program == LLAMA_CPP else ARITHMETIC_NOISE,
            )
        )
        first_PV = logits_PV if first_PV is None else first_PV
    return readings, not_run


def _readers(base: Path, export: Path, format: Format) -> list[tuple[str, Callable[[], Reader]]]:
    """Programs by their package's name, in order of trust; the first is what the others are compared with."""
    match format:
        case "adapter":
            return [("peft", lambda: open_with_peft(base, export)), ("gpt-oss", _no_adapters)]
        case "adapter_sglang":
            return [("peft", lambda: open_sglang_adapter_with_peft(base, export)), ("sglang", _no_gpu)]
        case "adapter_gguf":
            return [(LLAMA_CPP, lambda: one_by_one(open_adapter_with_llama_cpp(base, export / ADAPTER_FILE)))]
        case "gguf" | "gguf_q8_0":
            return [(LLAMA_CPP, lambda: one_by_one(LlamaCpp(export / MODEL_FILE)))]
    return [
        ("transformers", lambda: open_with_transformers(export)),
        ("gpt-oss", lambda: open_with_gpt_oss(export)),
        ("gptoss-ft", lambda: open_with_gptoss_ft(export)),
    ]


def _no_adapters() -> Reader:
    raise NotRun("it does not read adapters")


def _no_gpu() -> Reader:
    raise NotRun("it needs a GPU; PEFT computed with the factors that its loader makes of the file")


def _bar(program: str, num_readings: int, progress: bool) -> tqdm:
    """It stands at nothing while the program opens its files, and moves by parts of a sample with each layer."""
    return tqdm(
        total=num_readings,
        desc=f"reading with {program}",
        bar_format="{l_bar}{bar}| {n:.1f}/{total} samples [{elapsed}<{remaining}]",
        disable=not progress,
    )


def _rows(excerpts: Sequence[Excerpt]) -> Rows:
    return [(excerpt.input_ids_T, excerpt.positions_P) for excerpt in excerpts]
