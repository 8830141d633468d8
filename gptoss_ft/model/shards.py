"""Write safetensors checkpoints piece by piece: the headers follow from the shapes, so no tensor need be whole."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from tqdm import tqdm

from gptoss_ft.model.spec import TensorSpec

INDEX_FILE = "model.safetensors.index.json"
SAFETENSORS_DTYPES = {
    torch.uint8: "U8",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
}

# A tensor's content in order: contiguous pieces whose bytes add up to the declared size.
Producer = Callable[[], Iterable[Tensor | bytes]]
Entry = tuple[str, TensorSpec, Producer]


def _new_file(path: Path) -> BinaryIO:
    return path.open("wb")


def write_shards(
    folder: Path,
    tensors: Iterable[Entry],
    *,
    max_shard_bytes: float = 4.8e9,
    metadata: dict[str, str] | None = None,
    open_file: Callable[[Path], BinaryIO] = _new_file,
    progress: bool = False,
) -> list[Path]:
    """Write `tensors` to `model.safetensors`, or to shards with an index where they exceed `max_shard_bytes`.

    Shards are numbered from zero up to the last one's number, as OpenAI published them. Producers are called one
    after another; within a shard those whose size is no multiple of 64 bytes come last, which keeps the large
    tensors aligned for memory mapping.

    Args:
        open_file: gives the new file at a path; it is written from the start to the end.

    Returns:
        The files written, without the index.
    """
    metadata = {"format": "pt"} if metadata is None else metadata
    shards = _split(list(tensors), max_shard_bytes)
    total = sum(spec.nbytes for shard in shards for _, spec, _ in shard)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{number:05}-of-{len(shards) - 1:05}.safetensors" for number in range(len(shards))]
        weight_map = {tensor: file for file, shard in zip(names, shards, strict=True) for tensor, _, _ in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    with _bar(total, progress) as bar:
        for file, shard in zip(names, shards, strict=True):
            _write_file(open_file(folder / file), shard, metadata, bar)
    return [folder / file for file in names]


def write_safetensors(path: Path, tensors: list[Entry], *, progress: bool = False) -> None:
    """Write `tensors` to one file, large and aligned ones first."""
    (ordered,) = _split(tensors, float("inf"))
    with _bar(sum(spec.nbytes for _, spec, _ in ordered), progress) as bar:
        _write_file(_new_file(path), ordered, {"format": "pt"}, bar)


def _bar(total: int, progress: bool) -> tqdm:
    return tqdm(total=total, unit="B", unit_scale=True, desc="writing", disable=not progress)


def _split(tensors: list[Entry], max_shard_bytes: float) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in tensors:
        nbytes = entry[1].nbytes
        if shards[-1] and size + nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += nbytes
    return [sorted(shard, key=lambda entry: entry[1].nbytes % 64 != 0) for shard in shards]


def _write_file(file: BinaryIO, tensors: list[Entry], metadata: dict[str, str], bar: tqdm) -> None:
    with file:
        file.write(_header(tensors, metadata))
        for name, spec, produce in tensors:
            written = sum(write_pieces(file, produce(), bar))
            if written != spec.nbytes:
                raise RuntimeError(f"the producer of {name} gave {written} bytes where {spec} needs {spec.nbytes}")


def write_pieces(file: BinaryIO, pieces: Iterable[Tensor | bytes], bar: tqdm) -> Iterator[int]:
    """Write pieces one after another, yielding how many bytes each had."""
    for piece in pieces:
        data = piece.contiguous().flatten().view(torch.uint8).numpy().data if isinstance(piece, Tensor) else piece
        file.write(data)
        bar.update(len(data))
        yield len(data)


def _header(tensors: list[Entry], metadata: dict[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, spec, _ in tensors:
        entries[name] = {
            "dtype": SAFETENSORS_DTYPES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)
    return len(text).to_bytes(8, "little") + text
