"""LoRA adapters as llama.cpp loads them beside a GGUF model, expert stacks included.

llama.cpp multiplies an update by `adapter.lora.alpha` / r, one alpha for all, so B carries what differs from it: rsLoRA
and patterns of ranks or alphas. gate_up becomes two updates with the same A.

Shapes: E experts · O out rows · K in columns · r rank.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFType, GGUFWriter, Keys
from torch import Tensor

from gptoss_ft.errors import UserError
from gptoss_ft.export.adapter import read_adapter
from gptoss_ft.export.deltas import LowRankDelta, check_deltas
from gptoss_ft.export.gguf_layout import ADAPTER_FILE, ARCHITECTURE, GgufTensor, check_representable, gguf_tensors
from gptoss_ft.export.gguf_model import write_tensors
from gptoss_ft.export.gguf_read import open_gguf
from gptoss_ft.files import whole_folder
from gptoss_ft.model.checkpoint import Checkpoint
from gptoss_ft.model.manifest import Manifest
from gptoss_ft.model.shards import Producer
from gptoss_ft.model.spec import GptOssSpec


def export_adapter_gguf(folder: Path, out: Path, base: Checkpoint, *, progress: bool = True) -> Path:
    """Write a PEFT adapter of `base` to `adapter.gguf` in the new folder `out`, factors in fp32; returns `out`.

    Raises:
        UserError: as `read_adapter`; if llama.cpp cannot run the base; if `out` exists. Nothing is left behind.
    """
    check_representable(base.spec)
    deltas = read_adapter(folder, base.spec)
    # llama.cpp takes an alpha of 0 for none.
    alpha = max(delta.scaling * delta.A.shape[-2] for delta in deltas.values()) or 1.0
    entries = list(_entries(base.spec, deltas, alpha))
    with whole_folder(out, num_bytes=sum(tensor.nbytes for tensor, _ in entries)) as whole:
        manifest = Manifest(whole)
        writer = GGUFWriter(whole / ADAPTER_FILE, ARCHITECTURE)
        writer.add_type(GGUFType.ADAPTER)
        writer.add_string(Keys.Adapter.TYPE, "lora")
        writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
        write_tensors(manifest.open(whole / ADAPTER_FILE), writer, entries, progress=progress)
        manifest.write("adapter_gguf")
    return Path(out)


def read_adapter_gguf(file: Path, spec: GptOssSpec) -> dict[str, LowRankDelta]:
    """Read such a file back as updates by HF weight name.

    Raises:
        UserError: if it is no LoRA adapter of a gpt-oss model of this spec, naming the key or tensor at fault.
    """
    reader = open_gguf(file)
    stored = {
        "general.architecture": ARCHITECTURE,
        "general.type": GGUFType.ADAPTER,
        Keys.Adapter.TYPE: "lora",
    }
    for key, wanted in stored.items():
        if (found := _value(reader, key)) != wanted:
            raise UserError(f"{file}: {key} is {found!r}, not {wanted!r}: it is no adapter export, export again")
    alpha = _value(reader, Keys.Adapter.LORA_ALPHA)
    if not isinstance(alpha, float):
        raise UserError(f"{file} has no {Keys.Adapter.LORA_ALPHA}: export again")
    factors = {tensor.name: torch.from_numpy(np.array(tensor.data, np.float32)) for tensor in reader.tensors}
    deltas = {}
    for hf_name, parts in gguf_tensors(spec, "gguf").items():
        names = [f"{part.name}.lora_{factor}" for factor in "ab" for part in parts]
        if not any(name in factors for name in names):
            continue
        missing = [name for name in names if name not in factors]
        if missing:
            raise UserError(f"{file} has no {missing[0]}: export again")
        tensors = [factors.pop(name) for name in names]
        downs, ups = tensors[: len(parts)], tensors[len(parts) :]
        if not all(torch.equal(down, downs[0]) for down in downs):
            raise UserError(f"{file}: gate and up of {hf_name} do not share their A: export again")
        up = ups[0] if len(ups) == 1 else torch.stack(ups, dim=2).flatten(1, 2)
        deltas[hf_name] = LowRankDelta(downs[0], up, alpha / downs[0].shape[-2])
    if factors:
        raise UserError(f"{file} holds {next(iter(factors))}, which no gpt-oss model has: export again")
    check_deltas(spec, deltas)
    return deltas


def _entries(
    spec: GptOssSpec, deltas: Mapping[str, LowRankDelta], alpha: float
) -> Iterator[tuple[GgufTensor, Producer]]:
    for hf_name, parts in gguf_tensors(spec, "gguf").items():
        delta = deltas.get(hf_name)
        if delta is None:
            continue
        scale = delta.scaling * delta.A.shape[-2] / alpha
        for number, part in enumerate(parts):
            yield _factor(f"{part.name}.lora_a", delta.A, 1.0)
            yield _factor(f"{part.name}.lora_b", delta.B[..., number :: len(parts), :], scale)


def _factor(name: str, values: Tensor, scale: float) -> tuple[GgufTensor, Producer]:
    # Scaled when it is written: the adapter of gpt-oss-120b's experts would not fit into memory twice.
    return GgufTensor(name, GGMLQuantizationType.F32, tuple(values.shape)), lambda: [values.float() * scale]


def _value(reader: GGUFReader, key: str) -> object:
    field = reader.fields.get(key)
    return None if field is None else field.contents()
