"""Open GGUF exports with the `gguf` package's reader and give their tensors by the names of a checkpoint."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValue, GGUFValueType, GGUFWriter, dequantize
from torch import Tensor

from gptoss_ft.errors import UserError
from gptoss_ft.export.gguf_layout import ARCHITECTURE, MATRIX_TYPES, GgufFormat, from_ggml_blocks, gguf_tensors
from gptoss_ft.export.gguf_metadata import add_metadata
from gptoss_ft.export.merge import copy_tokenizer
from gptoss_ft.model.checkpoint import Checkpoint
from gptoss_ft.model.spec import Layout


class GgufModel:
    """A model file that is known to be a whole one of its base; tensors go by their names in the HF MXFP4 layout.

    Attributes:
        rounded: HF names of the tensors that are in fewer bits than their base has.
    """

    layout: Layout = "mxfp4"

    def __init__(self, file: Path, base: Checkpoint) -> None:
        """Check the head of a file against its base.

        Raises:
            UserError: if the file is damaged, or a key or a tensor is not what an export of this base has.
        """
        reader = open_gguf(file)
        self.file = file
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.format = self._format()
        self.parts = gguf_tensors(base.spec, self.format)
        self.rounded = {name for name, parts in self.parts.items() if parts[0].type == GGMLQuantizationType.Q8_0}
        self._check_tensors()
        _check_metadata(file, reader, base)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start:stop` of a tensor by its HF name: experts' `…_blocks` and `…_scales` as uint8, others in fp32."""
        stem, _, kind = name.rpartition("_")
        if kind in ("blocks", "scales"):
            tensors = [self.tensors[part.name] for part in self.parts[stem]]
            stored = [torch.from_numpy(tensor.data[start:stop].copy()) for tensor in tensors]
            values = [from_ggml_blocks(rows)[kind == "scales"] for rows in stored]
        else:
            tensors = [self.tensors[part.name] for part in self.parts[name]]
            values = [
                torch.from_numpy(dequantize(tensor.data[start:stop].copy(), tensor.tensor_type)) for tensor in tensors
            ]
        # Of gate and up, every other row is one's.
        return values[0] if len(values) == 1 else torch.stack(values, dim=2).flatten(1, 2)

    def _format(self) -> GgufFormat:
        embedding = self.tensors.get("token_embd.weight")
        for format, type in MATRIX_TYPES.items():
            if embedding is not None and embedding.tensor_type == type:
                return format
        raise UserError(f"{self.file} is none of our exports: token_embd.weight is not in it as BF16 or Q8_0")

    def _check_tensors(self) -> None:
        wanted = {part.name: part for parts in self.parts.values() for part in parts}
        for name, part in wanted.items():
            found = self.tensors.get(name)
            if found is None:
                raise UserError(f"{self.file} has no {name}: export again")
            if (shape := tuple(reversed(found.shape.tolist()))) != part.shape or found.tensor_type != part.type:
                raise UserError(
                    f"{self.file}: {name} is {found.tensor_type.name} {list(shape)}, but of this base it is "
                    f"{part.type.name} {list(part.shape)}: it is no export of this run"
                )
        foreign = sorted(self.tensors.keys() - wanted.keys())
        if foreign:
            raise UserError(f"{self.file} holds {foreign[0]}, which no gpt-oss model has: export again")


def open_gguf(file: Path) -> GGUFReader:
    """Read the head of a GGUF file.

    Raises:
        UserError: if it is no whole GGUF file.
    """
    try:
        return GGUFReader(file)
    except (ValueError, IndexError, KeyError) as error:
        raise UserError(f"{file} is no whole GGUF file ({error}): export again") from error


def _check_metadata(file: Path, reader: GGUFReader, base: Checkpoint) -> None:
    for key, value in _expected_metadata(base).items():
        field = reader.fields.get(key)
        found = None if field is None else field.contents()
        if found != _as_stored(value):
            shown = (
                f"{found!r} where the base has {value.value!r}" if isinstance(value.value, int | float) else "another"
            )
            raise UserError(f"{file}: {key} is {shown}: export again, or give the run of this export")


def _expected_metadata(base: Checkpoint) -> dict[str, GGUFValue]:
    writer = GGUFWriter(None, ARCHITECTURE)
    with TemporaryDirectory() as tokenizer:
        copy_tokenizer(base, Path(tokenizer))
        add_metadata(writer, base.spec, Path(tokenizer))
    return writer.kv_data[0]


def _as_stored(value: GGUFValue) -> Any:
    return float(np.float32(value.value)) if value.type == GGUFValueType.FLOAT32 else value.value
