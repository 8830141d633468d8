"""LoRA beside stacked experts on NVIDIA GPUs: one launch for all experts, with which tiles, and sums in how many parts.

These products read and write their rows once and compute little, so what counts is that all of a GPU takes part. Where
rows and columns make few programs, a sum is computed in parts, which a second kernel adds in a fixed order.

T rows · E experts · I columns · R LoRA rank · S parts of a sum
"""

from collections.abc import Collection, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gptoss_ft.kernels.gpu import device
from gptoss_ft.kernels.gpu.launch import ceil_div, launch, operand_dtype, range_table, tile_for, tile_table
from gptoss_ft.kernels.reference import check_low_rank

DTYPES = (torch.bfloat16, torch.float32)
# Two for each of an H100's 132 multiprocessors. It is no property of the GPU at hand, so that all give the same bits.
ENOUGH_PROGRAMS = 264
# A part shorter than this many steps is not worth the writing of its sum.
STEPS_OF_A_PART = 4


class Tile(NamedTuple):
    """The constants of a program beside R_: T_ rows by I_ columns."""

    T_: int
    I_: int
    num_warps: int = 4
    num_stages: int = 3


# By rows per expert, as for packed experts, and chosen by what `ahead_of_time` shows.
DOWN_TILES = (Tile(16, 128), Tile(64, 64))
UP_TILES = (Tile(16, 128), Tile(64, 128))
GRADIENT_TILE = Tile(64, 128)
# fp32 rows, of which gpt-oss has none on a GPU, are multiplied without tensor cores; larger tiles spill.
FP32_TILE = Tile(16, 128)
# Ranks of one program: products of tensor cores have no fewer than 16.
LEAST_RANKS, MOST_RANKS = 16, 64


def unavailable(where: torch.device, dtype: torch.dtype) -> str:
    """Why these products cannot run there on rows of `dtype`; empty if they can."""
    return device.unavailable(where, dtype, DTYPES)


def low_rank_down(
    x_TI: Tensor, factor_ERI: Tensor, ends_E: Sequence[int], experts: Collection[int] | None = None
) -> Tensor:
    """`reference.low_rank_down` of fp32 or bf16 rows.

    Raises:
        ValueError: if shapes or `ends_E` do not fit together.
    """
    T, _, R, I = check_low_rank(x_TI, factor_ERI, ends_E)
    x_TI, tile = x_TI.contiguous(), tile_for(_tiles(DOWN_TILES, x_TI), ends_E)
    tiles_N3 = tile_table(ends_E, tile.T_, x_TI.device, experts)
    programs, steps = len(tiles_N3) * ceil_div(R, ranks_of_a_tile(R, x_TI.dtype)), ceil_div(I, tile.I_)
    steps_of_part = ceil_div(steps, _num_parts(programs, steps))
    # Every row has a program, but for those of experts that are left out.
    fresh = x_TI.new_empty if experts is None else x_TI.new_zeros
    h_STR = fresh(ceil_div(steps, steps_of_part), T, R, dtype=torch.float32)
    arguments = (x_TI, factor_ERI, h_STR, tiles_N3, T, steps_of_part, *factor_ERI.stride())
    launch(_kernels().low_rank_down_kernel, programs * len(h_STR), *arguments, **_constants(x_TI, R, I, tile))
    return _sum_of_parts(h_STR)


def low_rank_up_(
    y_TI: Tensor,
    h_TR: Tensor,
    factor_ERI: Tensor,
    scaling: float,
    ends_E: Sequence[int],
    experts: Collection[int] | None = None,
) -> None:
    """`reference.low_rank_up_` on contiguous fp32 or bf16 rows.

    Raises:
        ValueError: if shapes or `ends_E` do not fit together, or `y` is not contiguous.
    """
    _, _, R, I = check_low_rank(y_TI, factor_ERI, ends_E, h_TR)
    if not y_TI.is_contiguous():
        raise ValueError("y must be contiguous, to be added to in place")
    tile = tile_for(_tiles(UP_TILES, y_TI), ends_E)
    tiles_N3 = tile_table(ends_E, tile.T_, y_TI.device, experts)
    arguments = (y_TI, h_TR.contiguous(), factor_ERI, tiles_N3, float(scaling), *factor_ERI.stride())
    programs = len(tiles_N3) * ceil_div(I, tile.I_)
    launch(_kernels().low_rank_up_kernel, programs, *arguments, **_constants(y_TI, R, I, tile))


def low_rank_gradient_(
    d_factor_ERI: Tensor,
    h_TR: Tensor,
    x_TI: Tensor,
    scaling: float,
    ends_E: Sequence[int],
    experts: Collection[int] | None = None,
) -> None:
    """`reference.low_rank_gradient_` from fp32 or bf16 rows.

    Raises:
        ValueError: if shapes or `ends_E` do not fit together.
    """
    T, E, R, I = check_low_rank(x_TI, d_factor_ERI, ends_E, h_TR)
    (tile,) = _tiles((GRADIENT_TILE,), x_TI)
    ranges_E2 = range_table(ends_E, x_TI.device, experts)
    programs = E * ceil_div(R, ranks_of_a_tile(R, x_TI.dtype)) * ceil_div(I, tile.I_)
    parts = _num_parts(programs, ceil_div(T, E * tile.T_))
    sums = d_factor_ERI[None] if parts == 1 else x_TI.new_empty(parts, E, R, I, dtype=torch.float32)
    arguments = (sums, h_TR.contiguous(), x_TI.contiguous(), ranges_E2, float(scaling), parts, *sums.stride())
    launch(_kernels().low_rank_gradient_kernel, parts * programs, *arguments, **_constants(x_TI, R, I, tile))
    if parts > 1:
        d_factor_ERI.copy_(_sum_of_parts(sums))


def ranks_of_a_tile(R: int, dtype: torch.dtype) -> int:
    """How many ranks a program takes, for rows of `dtype`."""
    most = MOST_RANKS if dtype == torch.bfloat16 else LEAST_RANKS
    return min(max(1 << (R - 1).bit_length(), LEAST_RANKS), most)


def _tiles(tiles: tuple[Tile, ...], rows: Tensor) -> tuple[Tile, ...]:
    return tiles if rows.dtype == torch.bfloat16 else (FP32_TILE,)


def _num_parts(programs: int, steps: int) -> int:
    """In how many parts `programs` sum over `steps`, so that there are enough of them."""
    return max(1, min(ENOUGH_PROGRAMS // max(1, programs), steps // STEPS_OF_A_PART))


def _sum_of_parts(parts: Tensor) -> Tensor:
    return parts[0] if len(parts) == 1 else parts.sum(0)


def _constants(rows: Tensor, R: int, I: int, tile: Tile) -> dict[str, Any]:
    ranks = ranks_of_a_tile(R, rows.dtype)
    return {"R": R, "I": I, "OPERAND": operand_dtype(rows), "R_": ranks, **tile._asdict()}


def _kernels() -> ModuleType:
    # torch for CPUs comes without triton, and refusals must be told there too.
    from gptoss_ft.kernels.gpu import low_rank_kernels

    return low_rank_kernels
