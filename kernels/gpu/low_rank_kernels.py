"""Triton kernels of LoRA beside stacked experts, one launch for all of them; `low_rank` launches them.

T rows · E experts · I columns · R LoRA rank · S parts of a sum
Constants of a tile end in an underscore: T_ by R_ by I_. Rows are sorted by expert; `tiles_N3` is that of `row_tiles`.

The stacked factor `[E, R, I]` comes with the strides it has: PEFT keeps B with the expert as its fastest dimension.
A program sums in fp32, without atomic adds, so the same input gives the same bits. Offsets are 64-bit.
"""

import triton
import triton.language as tl

from gptoss_ft.kernels.gpu.row_tiles import load_rows, store_rows, tile_of_rows


@triton.jit
def _factor_tile(r, i, expert, stride_E, stride_R, stride_I):
    """Offsets of a tile of one expert's factor, `[R_, I_]`."""
    return expert * stride_E + r.to(tl.int64)[:, None] * stride_R + i.to(tl.int64)[None, :] * stride_I


@triton.jit
def _load_factor(factor, r, i, expert, stride_E, stride_R, stride_I, R: tl.constexpr, I: tl.constexpr):
    tile = factor + _factor_tile(r, i, expert, stride_E, stride_R, stride_I)
    return tl.load(tile, mask=(r < R)[:, None] & (i < I)[None, :], other=0.0)


@triton.jit(do_not_specialize=["num_rows", "steps_of_part"])
def low_rank_down_kernel(
    x,
    factor,
    h,
    tiles_N3,
    num_rows,
    steps_of_part,
    stride_E,
    stride_R,
    stride_I,
    R: tl.constexpr,
    I: tl.constexpr,
    OPERAND: tl.constexpr,
    T_: tl.constexpr,
    R_: tl.constexpr,
    I_: tl.constexpr,
):
    """h[s] = x @ F[e].T over part s of the columns, for one tile of rows and R_ ranks."""
    tiles_of_R: tl.constexpr = tl.cdiv(R, R_)
    steps: tl.constexpr = tl.cdiv(I, I_)
    parts = tl.cdiv(steps, steps_of_part)
    part, rest = tl.program_id(0) % parts, tl.program_id(0) // parts
    row_T, in_T, expert = tile_of_rows(tiles_N3, rest // tiles_of_R, T_)
    r = rest % tiles_of_R * R_ + tl.arange(0, R_)
    acc_TR = tl.zeros((T_, R_), tl.float32)
    # Steps and not columns, so that the compiler knows the columns for multiples of I_ and reads several at once.
    for step in range(part * steps_of_part, min((part + 1) * steps_of_part, steps)):
        i = step * I_ + tl.arange(0, I_)
        f_RI = _load_factor(factor, r, i, expert, stride_E, stride_R, stride_I, R, I).to(OPERAND)
        x_TI = load_rows(x, row_T, in_T, i, I, OPERAND)
        acc_TR = tl.dot(x_TI, tl.trans(f_RI), acc_TR, input_precision="ieee")
    store_rows(h + part.to(tl.int64) * num_rows * R, acc_TR, row_T, in_T, r, R)


@triton.jit
def low_rank_up_kernel(
    y,
    h,
    factor,
    tiles_N3,
    scaling,
    stride_E,
    stride_R,
    stride_I,
    R: tl.constexpr,
    I: tl.constexpr,
    OPERAND: tl.constexpr,
    T_: tl.constexpr,
    R_: tl.constexpr,
    I_: tl.constexpr,
):
    """y += scaling * h @ F[e] for one tile of rows and I_ columns."""
    tiles_of_I: tl.constexpr = tl.cdiv(I, I_)
    row_T, in_T, expert = tile_of_rows(tiles_N3, tl.program_id(0) // tiles_of_I, T_)
    i = tl.program_id(0) % tiles_of_I * I_ + tl.arange(0, I_)
    acc_TI = tl.zeros((T_, I_), tl.float32)
    for r0 in tl.static_range(0, R, R_):
        r = r0 + tl.arange(0, R_)
        f_RI = _load_factor(factor, r, i, expert, stride_E, stride_R, stride_I, R, I).to(OPERAND)
        acc_TI = tl.dot(load_rows(h, row_T, in_T, r, R, OPERAND), f_RI, acc_TI, input_precision="ieee")
    store_rows(y, load_rows(y, row_T, in_T, i, I, tl.float32) + scaling * acc_TI, row_T, in_T, i, I)


@triton.jit(do_not_specialize=["num_parts"])
def low_rank_gradient_kernel(
    d_factor,
    h,
    x,
    ranges_E2,
    scaling,
    num_parts,
    stride_S,
    stride_E,
    stride_R,
    stride_I,
    R: tl.constexpr,
    I: tl.constexpr,
    OPERAND: tl.constexpr,
    T_: tl.constexpr,
    R_: tl.constexpr,
    I_: tl.constexpr,
):
    """d_factor[s, e] = scaling * h.T @ x over part s of the expert's rows, for R_ ranks and I_ columns."""
    tiles_of_R: tl.constexpr = tl.cdiv(R, R_)
    tiles_of_I: tl.constexpr = tl.cdiv(I, I_)
    part, rest = tl.program_id(0) % num_parts, tl.program_id(0) // num_parts
    i = rest % tiles_of_I * I_ + tl.arange(0, I_)
    r = rest // tiles_of_I % tiles_of_R * R_ + tl.arange(0, R_)
    expert = rest // tiles_of_I // tiles_of_R
    start, end = tl.load(ranges_E2 + 2 * expert), tl.load(ranges_E2 + 2 * expert + 1)
    rows_of_part = tl.cdiv(tl.cdiv(end - start, T_), num_parts) * T_
    first = start + part * rows_of_part
    last = min(first + rows_of_part, end)
    acc_RI = tl.zeros((R_, I_), tl.float32)
    for row in range(first, last, T_):
        row_T = row + tl.arange(0, T_)
        in_T, row_T = row_T < last, row_T.to(tl.int64)
        h_TR = load_rows(h, row_T, in_T, r, R, OPERAND)
        acc_RI = tl.dot(tl.trans(h_TR), load_rows(x, row_T, in_T, i, I, OPERAND), acc_RI, input_precision="ieee")
    tile = _factor_tile(r, i, expert.to(tl.int64), stride_E, stride_R, stride_I) + part.to(tl.int64) * stride_S
    value_RI = (scaling * acc_RI).to(d_factor.dtype.element_ty)
    tl.store(d_factor + tile, value_RI, mask=(r < R)[:, None] & (i < I)[None, :])
