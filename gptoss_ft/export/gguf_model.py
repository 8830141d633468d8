"""Write a merged model as one GGUF file, as a stream: its head follows from the shapes, so no tensor need be whole."""

from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from io import BufferedWriter
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.gguf_writer import WriterState
from torch import Tensor
from tqdm import tqdm

from gptoss_ft.errors import UserError
from gptoss_ft.export.gguf_layout import ARCHITECTURE, GgufFormat, GgufTensor, gguf_tensors, to_ggml_blocks, to_q8_0
from gptoss_ft.export.gguf_metadata import add_metadata
from gptoss_ft.export.merged import MergedWeights, drain
from gptoss_ft.kernels.reference import SCALE_NAN
from gptoss_ft.model.shards import Producer, write_pieces

# Rows that are converted at once: fp32 copies of an embedding's stay below 12 MB.
CHUNK_ROWS = 1024


def write_model(
    file: BufferedWriter, weights: MergedWeights, format: GgufFormat, tokenizer: Path, *, progress: bool = True
) -> None:
    """Write every weight to `file`; the experts' MXFP4 numbers keep their bits.

    Memory holds one expert, and the up half of a layer while its gates are written: 0.14 GB of gpt-oss-20b and
    0.56 GB of gpt-oss-120b.

    Args:
        tokenizer: folder of the tokenizer files.

    Raises:
        UserError: if the tokenizer or a scale is none that llama.cpp can read.
    """
    writer = GGUFWriter(file.name, ARCHITECTURE)
    add_metadata(writer, weights.base.spec, tokenizer)
    entries: list[tuple[GgufTensor, Producer]] = []
    for name, tensors in gguf_tensors(weights.base.spec, format).items():
        entries += zip(tensors, _producers(weights, name, tensors), strict=True)
    write_tensors(file, writer, entries, progress=progress)


def write_tensors(
    file: BufferedWriter, writer: GGUFWriter, entries: list[tuple[GgufTensor, Producer]], *, progress: bool
) -> None:
    """Write the head, then every tensor's pieces, into an empty file, and close it."""
    for tensor, _ in entries:
        # The dtype counts for tensors without a type, and uint8 for shapes in bytes: neither is the case.
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, tensor.type)
    # It would open the file itself.
    writer.fout, writer.state = [file], WriterState.EMPTY
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        # The writer's own methods take whole tensors.
        total = sum(tensor.nbytes for tensor, _ in entries)
        with tqdm(total=total, unit="B", unit_scale=True, desc="writing", disable=not progress) as bar:
            for tensor, produce in entries:
                writer.write_padding(file, file.tell())
                written = sum(write_pieces(file, produce(), bar))
                if written != tensor.nbytes:
                    raise RuntimeError(f"the producer of {tensor} gave {written} bytes, not {tensor.nbytes}")
        writer.write_padding(file, file.tell())
    finally:
        writer.close()


def _producers(weights: MergedWeights, hf_name: str, tensors: tuple[GgufTensor, ...]) -> Sequence[Producer]:
    """The content of each GGUF tensor that an HF tensor becomes."""
    type, num_parts = tensors[0].type, len(tensors)
    if type != GGMLQuantizationType.MXFP4:
        return [partial(_dense, weights, hf_name, type, slice(part, None, num_parts)) for part in range(num_parts)]
    # Gate and up come from one rounding; the up rows wait in memory for their turn.
    waiting: deque[Tensor] = deque()
    first = partial(_first_rows, weights, hf_name, num_parts, waiting)
    return [first, partial(drain, waiting)][:num_parts]


def _dense(weights: MergedWeights, hf_name: str, type: GGMLQuantizationType, columns: slice) -> Iterator[Tensor]:
    for piece in weights.linear(hf_name):
        for rows in piece.split(CHUNK_ROWS):
            yield _as_type(rows[..., columns], type)


def _as_type(values: Tensor, type: GGMLQuantizationType) -> Tensor:
    match type:
        case GGMLQuantizationType.BF16:
            return values
        case GGMLQuantizationType.Q8_0:
            return to_q8_0(values)
        case _:
            return values.float()


def _first_rows(weights: MergedWeights, hf_name: str, step: int, waiting: deque[Tensor]) -> Iterator[Tensor]:
    """The experts' rows 0, step, 2·step, ...; the rows after each of them go to `waiting`."""
    for blocks, scales in weights.packed_experts(hf_name):
        if bool((scales == SCALE_NAN).any()):
            raise UserError(f"{hf_name} holds NaN, which ggml's MXFP4 cannot say: the base is damaged")
        first, *rest = (to_ggml_blocks(blocks[part::step], scales[part::step]) for part in range(step))
        waiting.extend(rest)
        yield first
