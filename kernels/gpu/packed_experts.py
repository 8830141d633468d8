"""Products with packed MXFP4 experts on NVIDIA GPUs: when each Triton kernel runs, and with which tiles.

Two ways to the same result. *Fused* kernels decode weights inside the product, again for every tile of rows. With many
rows per expert that work outgrows the product: then weights are *decoded in chunks* of experts into one bf16 buffer,
and `torch.nn.functional.grouped_mm` multiplies.

T rows · E experts · I input features · O output features · G blocks of 32 inputs (I = 32·G) · B bytes per block (16)
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gptoss_ft.kernels.gpu import device
from gptoss_ft.kernels.gpu.launch import ceil_div, launch, num_used, on_device, operand_dtype, tile_for, tile_table
from gptoss_ft.kernels.reference import BLOCK_SIZE, MXFP4Weight, check_packed_rows

FUSED_ROWS_VARIABLE = "GPTOSS_FT_FUSED_ROWS"
# From this many rows per expert on weights are decoded in chunks. Taken from what others report of one GPU: nobody
# has measured these kernels.
FUSED_ROWS = 192
CHUNK_BYTES = 512 * 2**20
DECODED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ALWAYS, NEVER = 10**9, 0  # fused, in `fusing_under`

_asked_for: ContextVar[int | None] = ContextVar("asked_for", default=None)


class Tile(NamedTuple):
    """The constants of a product's program: it computes T_ rows by O_ (forward) or I_ (backward) columns."""

    T_: int
    O_: int
    I_: int
    num_warps: int
    num_stages: int


# By rows per expert: the first whose T_ has room for them, or the last. Steps of 64 divide gpt-oss's 2880 and 5760, so
# the sums have no remainder. Chosen by what `ahead_of_time` shows (no spills, full tensor-core tiles), not by timing.
FORWARD_TILES = (Tile(16, 128, 64, 4, 3), Tile(64, 128, 64, 4, 3), Tile(128, 128, 64, 8, 3))
BACKWARD_TILES = (Tile(16, 64, 128, 4, 3), Tile(64, 64, 128, 4, 3), Tile(128, 64, 128, 8, 3))
BIAS_TILE_T, BIAS_TILE_O = 16, 256
DECODE_TILE = 128


def unavailable(where: torch.device, dtype: torch.dtype) -> str:
    """Why `grouped_linear` and `grouped_linear_dx` cannot run there on rows of `dtype`; empty if they can."""
    return device.unavailable(where, dtype, (torch.bfloat16,))


def dequantize_unavailable(where: torch.device, dtype: torch.dtype) -> str:
    """Why `dequantize_mxfp4` cannot run there into `dtype`; empty if it can."""
    return device.unavailable(where, dtype, DECODED_DTYPES)


def fused_rows() -> int:
    """Rows per expert from which weights are decoded in chunks: FUSED_ROWS, or the variable GPTOSS_FT_FUSED_ROWS.

    Raises:
        ValueError: if the variable is no count.
    """
    asked_for = _asked_for.get()
    if asked_for is not None:
        return asked_for
    text = os.environ.get(FUSED_ROWS_VARIABLE) or str(FUSED_ROWS)
    if not text.isdecimal():
        raise ValueError(f"{FUSED_ROWS_VARIABLE}={text}: give a number of rows per expert, or unset it")
    return int(text)


@contextmanager
def fusing_under(rows: int) -> Iterator[None]:
    """Weights are decoded in chunks from `rows` per expert on, whatever the variable says."""
    before = _asked_for.set(rows)
    try:
        yield
    finally:
        _asked_for.reset(before)


def grouped_linear(x_TI: Tensor, weight: MXFP4Weight, bias_EO: Tensor | None, ends_E: Sequence[int]) -> Tensor:
    """`reference.grouped_linear` for bf16 rows, summed in fp32.

    Raises:
        ValueError: if shapes or `ends_E` do not fit together.
    """
    E, O, I = check_packed_rows(x_TI, weight, ends_E, inputs=True)
    if bias_EO is not None and bias_EO.shape != (E, O):
        raise ValueError(f"bias {tuple(bias_EO.shape)} must be {(E, O)}")
    x_TI, bias_EO = x_TI.contiguous(), None if bias_EO is None else bias_EO.contiguous()
    y_TO = x_TI.new_empty(x_TI.shape[0], O)
    if not x_TI.shape[0]:
        return y_TO
    if not _decodes_chunks(x_TI, O, ends_E):
        tile = tile_for(FORWARD_TILES, ends_E)
        tiles_N3 = tile_table(ends_E, tile.T_, x_TI.device)
        launch(
            _kernels().grouped_linear_kernel,
            len(tiles_N3) * ceil_div(O, tile.O_),
            x_TI,
            *weight,
            bias_EO,
            y_TO,
            tiles_N3,
            O=O,
            I=I,
            HAS_BIAS=bias_EO is not None,
            OPERAND=operand_dtype(x_TI),
            **tile._asdict(),
        )
        return y_TO
    for experts, rows, ends, w_EOI in _decoded_chunks(weight, ends_E, x_TI.dtype):
        product_TO = _grouped_mm(x_TI[rows], w_EOI.transpose(1, 2), ends)
        if bias_EO is None:
            y_TO[rows] = product_TO
        else:
            tiles_N3 = tile_table(ends, BIAS_TILE_T, x_TI.device, kept=False)
            programs = len(tiles_N3) * ceil_div(O, BIAS_TILE_O)
            arguments = (product_TO, bias_EO[experts], y_TO[rows], tiles_N3)
            launch(_kernels().add_bias_kernel, programs, *arguments, O=O, T_=BIAS_TILE_T, O_=BIAS_TILE_O)
    return y_TO


def grouped_linear_dx(dy_TO: Tensor, weight: MXFP4Weight, ends_E: Sequence[int]) -> Tensor:
    """`reference.grouped_linear_dx` for bf16 rows, under the same promise and checks as `grouped_linear`."""
    _, O, I = check_packed_rows(dy_TO, weight, ends_E, inputs=False)
    dy_TO = dy_TO.contiguous()
    dx_TI = dy_TO.new_empty(dy_TO.shape[0], I)
    if not dy_TO.shape[0]:
        return dx_TI
    if not _decodes_chunks(dy_TO, O, ends_E):
        tile = tile_for(BACKWARD_TILES, ends_E)
        tiles_N3 = tile_table(ends_E, tile.T_, dy_TO.device)
        launch(
            _kernels().grouped_linear_dx_kernel,
            len(tiles_N3) * ceil_div(I, tile.I_),
            dy_TO,
            *weight,
            dx_TI,
            tiles_N3,
            O=O,
            I=I,
            OPERAND=operand_dtype(dy_TO),
            **tile._asdict(),
        )
        return dx_TI
    for _, rows, ends, w_EOI in _decoded_chunks(weight, ends_E, dy_TO.dtype):
        dx_TI[rows] = _grouped_mm(dy_TO[rows], w_EOI, ends)
    return dx_TI


def dequantize_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """`reference.dequantize_mxfp4` into bf16, fp16 or fp32, with the same bits.

    Raises:
        ValueError: if there is not one scale for each block of 16 bytes.
    """
    if blocks.shape != (*scales.shape, BLOCK_SIZE // 2):
        raise ValueError(f"{tuple(blocks.shape)} blocks do not go with {tuple(scales.shape)} scales")
    out = torch.empty(*scales.shape, BLOCK_SIZE, dtype=dtype, device=blocks.device)
    _dequantize_into(out, blocks.contiguous(), scales.contiguous())
    return out.flatten(-2)


def _dequantize_into(out: Tensor, blocks: Tensor, scales: Tensor) -> None:
    if num_blocks := scales.numel():
        programs = ceil_div(num_blocks, DECODE_TILE)
        launch(_kernels().dequantize_kernel, programs, blocks, scales, out, num_blocks, N_=DECODE_TILE)


def _decodes_chunks(rows: Tensor, O: int, ends_E: Sequence[int]) -> bool:
    """Whether to decode weights before multiplying `rows`."""
    # grouped_mm wants rows that start at multiples of 16 bytes, and pads its output to have them.
    aligned = rows.data_ptr() % 16 == 0 and O * rows.element_size() % 16 == 0
    return aligned and rows.shape[0] >= fused_rows() * num_used(ends_E)


def _decoded_chunks(
    weight: MXFP4Weight, ends_E: Sequence[int], dtype: torch.dtype
) -> Iterator[tuple[slice, slice, list[int], Tensor]]:
    """(experts, their rows, where each one's end counted from the first, their weights `[E, O, I]`) of each chunk.

    All weights are written to one buffer: those of a chunk last until the next one.
    """
    E, O, G, _ = weight.blocks_EOGB.shape
    per_chunk = min(E, max(1, CHUNK_BYTES // (O * G * BLOCK_SIZE * dtype.itemsize)))
    buffer = torch.empty(per_chunk, O, G * BLOCK_SIZE, dtype=dtype, device=weight.blocks_EOGB.device)
    start = 0
    for first in range(0, E, per_chunk):
        experts = slice(first, min(first + per_chunk, E))
        end = ends_E[experts.stop - 1]
        if end > start:
            w_EOI = buffer[: experts.stop - first]
            _dequantize_into(w_EOI, weight.blocks_EOGB[experts], weight.scales_EOG[experts])
            yield experts, slice(start, end), [e - start for e in ends_E[experts]], w_EOI
        start = end


def _grouped_mm(rows: Tensor, weights: Tensor, ends_E: Sequence[int]) -> Tensor:
    return F.grouped_mm(rows, weights, offs=on_device(ends_E, rows.device))


def _kernels() -> ModuleType:
    # torch for CPUs comes without triton, and refusals must be told there too.
    from gptoss_ft.kernels.gpu import mxfp4_kernels

    return mxfp4_kernels
