"""Open a gpt-oss checkpoint in any published layout, checked from its headers and mapped into memory."""

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from gptoss_ft.errors import UserError
from gptoss_ft.model import layouts
from gptoss_ft.model.manifest import check_sizes
from gptoss_ft.model.shards import INDEX_FILE, SAFETENSORS_DTYPES
from gptoss_ft.model.spec import GptOssSpec, Layout, TensorSpec

TORCH_DTYPES = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}
COPY_BYTES = 1 << 24
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's place in its file: `nbytes` of the spec from `offset` on, counted from the start of the file."""

    file: Path
    offset: int
    dtype_name: str
    shape: tuple[int, ...]

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(TORCH_DTYPES[self.dtype_name], self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is known to be whole; tensors go by their HF names whatever the layout.

    Attributes:
        config: config.json as read.
        stored: every tensor under the name its file gives it.
    """

    path: Path
    layout: Layout
    spec: GptOssSpec
    config: dict[str, Any]
    stored: dict[str, StoredTensor]
    _maps: dict[Path, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, path: Path | str) -> "Checkpoint":
        """Read config.json and the safetensors headers in `path`, and an export's manifest.json, and nothing else.

        Raises:
            UserError: if the folder is not a whole gpt-oss checkpoint: names the file and the tensors at fault. If a
                file of an export has another size than when it was written.
        """
        path = Path(path)
        config = _read_config(path)
        check_sizes(path)
        layout, spec = _identify(config, str(path / "config.json"))
        stored = _read_headers(path)
        _check_tensors(path, stored, spec.tensors(layout), layout)
        return cls(path, layout, spec, config, stored)

    def names(self) -> list[str]:
        """HF names in model order: the bf16 layout's, or else the MXFP4 layout's."""
        return list(self.tensor_specs())

    def tensor_specs(self) -> dict[str, TensorSpec]:
        """Type and shape of every tensor by HF name."""
        return self.spec.tensors("bf16" if self.layout == "bf16" else "mxfp4")

    def nbytes(self) -> int:
        return self.spec.num_bytes(self.layout)

    def tensor(self, name: str) -> Tensor:
        """The tensor as a view of the mapped file; private, so writing to it leaves the file alone.

        Raises:
            KeyError: if the checkpoint's layout has no tensor of this name.
        """
        stored_name, rows = self._locate(name)
        file = self.stored[stored_name].file
        if file not in self._maps:
            self._maps[file] = safe_open(file, framework="pt")
        whole = self._maps[file].get_tensor(stored_name)
        return whole if rows is None else whole[rows]

    def raw(self, name: str) -> tuple[Path, int, int]:
        """The file, offset and number of bytes that hold the tensor."""
        stored_name, rows = self._locate(name)
        stored = self.stored[stored_name]
        if rows is None:
            return stored.file, stored.offset, stored.spec.nbytes
        row_bytes = stored.spec.nbytes // stored.shape[0]
        return stored.file, stored.offset + rows.start * row_bytes, (rows.stop - rows.start) * row_bytes

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start:stop` of the tensor in memory of their own.

        For passes over a whole checkpoint: pages of a map would count towards the process until they are dropped.
        """
        spec = self.tensor_specs()[name]
        file, offset, nbytes = self.raw(name)
        stop = spec.shape[0] if stop is None else stop
        row_bytes = nbytes // spec.shape[0]
        data = np.fromfile(file, np.uint8, (stop - start) * row_bytes, offset=offset + start * row_bytes)
        return torch.from_numpy(data).view(spec.dtype).view(stop - start, *spec.shape[1:])

    def copy(self, name: str) -> Iterator[bytes]:
        """The tensor's bytes, in pieces."""
        file, offset, remaining = self.raw(name)
        with file.open("rb") as source:
            source.seek(offset)
            while remaining:
                piece = source.read(min(remaining, COPY_BYTES))
                if not piece:
                    raise UserError(f"{file} was shortened while it was read")
                remaining -= len(piece)
                yield piece

    def _locate(self, name: str) -> tuple[str, slice | None]:
        if self.layout != "original":
            if name not in self.stored:
                raise KeyError(f"{name} is no tensor of {self.path}, which is in the {self.layout} layout")
            return name, None
        part = layouts.stacked_part(name)
        return layouts.to_original(name), None if part is None else self.spec.qkv_rows()[part]


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise UserError(f"{path} is no folder: give the local folder of a gpt-oss checkpoint")
    if not (path / "config.json").is_file():
        hint = "; it is an adapter, so give its base model" if (path / "adapter_config.json").exists() else ""
        raise UserError(f"{path} has no config.json, so it is no checkpoint folder{hint}")
    return _read_json(path / "config.json")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): copy or download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return content


def _identify(config: dict[str, Any], where: str) -> tuple[Layout, GptOssSpec]:
    if "model_type" not in config and "num_experts" in config:
        return "original", GptOssSpec.from_original_config(config, where)
    spec = GptOssSpec.from_hf_config(config, where)
    quantization = config.get("quantization_config")
    if quantization is None:
        return "bf16", spec
    method = quantization.get("quant_method")
    if method != "mxfp4":
        raise UserError(f"{where}: quant_method is {method!r}; use the MXFP4 or the bf16 checkpoint")
    return "mxfp4", spec


def _read_headers(path: Path) -> dict[str, StoredTensor]:
    stored: dict[str, StoredTensor] = {}
    weight_map = _weight_map(path)
    for file in _weight_files(path, weight_map):
        for name, tensor in _read_header(file).items():
            if name in stored:
                raise UserError(f"{name} is in {stored[name].file.name} and in {file.name} of {path}: remove one file")
            stored[name] = tensor
    for name, file_name in (weight_map or {}).items():
        if name not in stored or stored[name].file.name != file_name:
            where = f"is in {stored[name].file.name}" if name in stored else "is in none of the files"
            raise UserError(
                f"{path / INDEX_FILE} says that {name} is in {file_name}, but it {where}: "
                "the index and the files are of different checkpoints, copy or download both again"
            )
    return stored


def _weight_map(path: Path) -> dict[str, str] | None:
    """File name by tensor, as the index says; None without an index."""
    if not (path / INDEX_FILE).exists():
        return None
    weight_map = _read_json(path / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(f"{path / INDEX_FILE} has no weight_map: copy or download it again")
    return weight_map


def _weight_files(path: Path, weight_map: dict[str, str] | None) -> list[Path]:
    if weight_map is None:
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise UserError(f"{path} has no *.safetensors files: its weights are missing or not downloaded yet")
        return files
    names = sorted(set(weight_map.values()))
    absent = [name for name in names if not (path / name).is_file()]
    if absent:
        raise UserError(
            f"{path}: {len(absent)} of the {len(names)} files that {INDEX_FILE} names are absent: {_first(absent)}; "
            "finish the download"
        )
    return [path / name for name in names]


def _read_header(file: Path) -> dict[str, StoredTensor]:
    size = file.stat().st_size
    with file.open("rb") as source:
        length = int.from_bytes(source.read(8), "little")
        if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise UserError(f"{file} ({size} bytes) is no whole safetensors file: copy or download it again")
        try:
            header = json.loads(source.read(length))
        except ValueError as error:
            raise UserError(f"{file} has a damaged safetensors header: copy or download it again") from error
    header.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != 8 + length + end:
        verb = "is truncated" if size < 8 + length + end else "is damaged"
        raise UserError(
            f"{file} {verb}: it has {size} bytes where its header says {8 + length + end}; copy or download it again"
        )
    return {
        name: StoredTensor(file, 8 + length + entry["data_offsets"][0], entry["dtype"], tuple(entry["shape"]))
        for name, entry in header.items()
    }


def _check_tensors(
    path: Path, stored: dict[str, StoredTensor], expected: dict[str, TensorSpec], layout: Layout
) -> None:
    faults = []
    missing = [name for name in expected if name not in stored]
    if missing:
        faults.append(f"{len(missing)} of {len(expected)} tensors are missing: {_first(missing)}")
    unexpected = [f"{name} ({tensor.file.name})" for name, tensor in stored.items() if name not in expected]
    if unexpected:
        faults.append(f"{len(unexpected)} are unexpected: {_first(unexpected)}")
    wrong = [
        f"{name} ({found.file.name}) is {found.dtype_name} {list(found.shape)} where config.json asks for "
        f"{SAFETENSORS_DTYPES[wanted.dtype]} {list(wanted.shape)}"
        for name, wanted in expected.items()
        if (found := stored.get(name)) and (found.dtype_name, found.shape) != _declared(wanted)
    ]
    if wrong:
        faults.append(f"{len(wrong)} have another type or shape: {_first(wrong)}")
    if faults:
        raise UserError(f"{path} is not a whole gpt-oss checkpoint in the {layout} layout: {'; '.join(faults)}")


def _declared(spec: TensorSpec) -> tuple[str, tuple[int, ...]]:
    return SAFETENSORS_DTYPES[spec.dtype], spec.shape


def _first(names: Collection[str], count: int = 3) -> str:
    return ", ".join(list(names)[:count]) + (", ..." if len(names) > count else "")
