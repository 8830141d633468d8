"""What Triton kernels over rows sorted by expert share: which rows a program has, and how it reads and writes them.

T rows · F features of a row. `tiles_N3` says for every tile of rows where it starts, how many rows it has and which
expert's they are (int32). Offsets are 64-bit: rows times features pass 2^31 at 373 thousand rows of gpt-oss's 5760.
"""

import triton
import triton.language as tl


@triton.jit
def tile_of_rows(tiles_N3, tile, T_: tl.constexpr):
    """The rows of a tile, which of them exist, and their expert."""
    t = tl.arange(0, T_)
    row_T = tl.load(tiles_N3 + 3 * tile).to(tl.int64) + t
    return row_T, t < tl.load(tiles_N3 + 3 * tile + 1), tl.load(tiles_N3 + 3 * tile + 2).to(tl.int64)


@triton.jit
def load_rows(rows, row_T, in_T, f, F: tl.constexpr, DTYPE: tl.constexpr):
    """Features `f` of the given rows of `[T, F]`; 0 outside `in_T` and F."""
    tile = tl.load(rows + row_T[:, None] * F + f[None, :], mask=in_T[:, None] & (f < F)[None, :], other=0.0)
    return tile.to(DTYPE)


@triton.jit
def store_rows(out, value_TF, row_T, in_T, f, F: tl.constexpr):
    """Write features `f` of the given rows of `[T, F]`, but for what is outside `in_T` and F."""
    mask = in_T[:, None] & (f < F)[None, :]
    tl.store(out + row_T[:, None] * F + f[None, :], value_TF.to(out.dtype.element_ty), mask=mask)
