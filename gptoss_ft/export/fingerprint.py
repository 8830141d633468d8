"""Tell two bases of one shape apart, so that no adapter is merged into a model it was not trained on."""

import json
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from gptoss_ft.errors import UserError
from gptoss_ft.files import write_whole
from gptoss_ft.kernels.reference import BLOCK_SIZE, dequantize_mxfp4
from gptoss_ft.model.checkpoint import Checkpoint

BASE_FILE = "base.json"

SAMPLE_BYTES = 4096
# The corner of every expert: few rows and few columns, as the layouts disagree on which of them lie together.
SAMPLE_ROWS, SAMPLE_COLUMNS = 16, 8


def base_fingerprint(checkpoint: Checkpoint) -> str:
    """A sha256 of a checkpoint's sizes and of some values of every tensor, equal for every layout and sharding.

    Of each expert the first 16 x 8 weights count, of any other tensor the first 4 KiB.
    """
    sizes = {key: float(value) for key, value in checkpoint.spec.original_config().items()}
    digest = sha256(json.dumps(sizes, sort_keys=True).encode())
    for name, values in _samples(checkpoint):
        digest.update(name.encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def write_fingerprint(run: Path, checkpoint: Checkpoint) -> None:
    """Record in the run folder, as base.json, what base it trains on."""
    content = {
        "path": str(checkpoint.path.resolve()),
        "layout": checkpoint.layout,
        "fingerprint": base_fingerprint(checkpoint),
    }
    write_whole(Path(run) / BASE_FILE, json.dumps(content, indent=2) + "\n")


def check_fingerprint(run: Path, checkpoint: Checkpoint) -> None:
    """Compare a checkpoint with the run's base.json; a run folder without one is not checked.

    Raises:
        UserError: if it is not the base that the run trained on.
    """
    file = Path(run) / BASE_FILE
    if not file.exists():
        return
    try:
        recorded = json.loads(file.read_bytes())
        path, layout, fingerprint = (recorded[key] for key in ("path", "layout", "fingerprint"))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged: remove it to use {checkpoint.path} without this check") from error
    if base_fingerprint(checkpoint) != fingerprint:
        raise UserError(
            f"{checkpoint.path} is not the base that {run} trained on: give that one, then at {path} ({layout}), "
            "with base=FOLDER"
        )


def _samples(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Some bytes of every tensor by its name in the bf16 layout."""
    for name, tensor in checkpoint.spec.tensors("bf16").items():
        if len(tensor.shape) == 3:
            # Writers differ in the sign of a zero.
            yield name, (_corners(checkpoint, name, *tensor.shape) + 0.0).contiguous().view(torch.uint8)
        else:
            file, offset, nbytes = checkpoint.raw(name)
            yield name, _read(file, [offset], min(nbytes, SAMPLE_BYTES))


def _corners(checkpoint: Checkpoint, name: str, num_experts: int, num_columns: int, num_rows: int) -> Tensor:
    """bf16 [experts, rows, columns], exact in every layout."""
    if checkpoint.layout == "bf16":
        file, offset, _ = checkpoint.raw(name)
        columns = [expert * num_columns + column for expert in range(num_experts) for column in range(SAMPLE_COLUMNS)]
        values = _read(file, [offset + 2 * num_rows * column for column in columns], 2 * SAMPLE_ROWS)
        return values.view(torch.bfloat16).view(num_experts, SAMPLE_COLUMNS, SAMPLE_ROWS).transpose(1, 2)
    num_groups = num_columns // BLOCK_SIZE
    packed = []
    for part, row_bytes in (("blocks", num_groups * BLOCK_SIZE // 2), ("scales", num_groups)):
        file, offset, _ = checkpoint.raw(f"{name}_{part}")
        starts = [offset + expert * num_rows * row_bytes for expert in range(num_experts)]
        rows = _read(file, starts, SAMPLE_ROWS * row_bytes)
        packed.append(rows.view(num_experts, SAMPLE_ROWS, num_groups, -1)[:, :, :1])
    blocks, scales = packed
    return dequantize_mxfp4(blocks, scales.squeeze(-1), torch.bfloat16)[..., :SAMPLE_COLUMNS]


def _read(file: Path, starts: Sequence[int], nbytes: int) -> Tensor:
    """uint8 [starts, nbytes]. Not mapped: a system may refuse to map a file that is larger than its memory."""
    data = bytearray()
    with file.open("rb", buffering=0) as source:
        for start in starts:
            source.seek(start)
            data += source.read(nbytes)
    return torch.frombuffer(data, dtype=torch.uint8).view(len(starts), nbytes)
