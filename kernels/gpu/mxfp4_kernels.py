"""Triton kernels over packed MXFP4 experts, in the byte layout of the checkpoint; `packed_experts` launches them.

T rows · E experts · I input features · O output features · G blocks of 32 inputs (I = 32·G) · B bytes of a row (I/2)
Constants of a tile end in an underscore: T_ by O_ by I_. Rows are sorted by expert; `tiles_N3` is that of `row_tiles`.

A program owns a tile of the output and sums over the whole reduction itself, in fp32: no atomic adds, so the same
input gives the same bits. Offsets are 64-bit: 120b has 2^30.98 packed weights in one stack, and rows times features
pass 2^31 at 373 thousand rows.
"""

import triton
import triton.language as tl

from gptoss_ft.kernels.gpu.row_tiles import load_rows, store_rows, tile_of_rows


@triton.jit
def _decode(pairs_OB, scales_OG, O_: tl.constexpr, I_: tl.constexpr):
    """Bytes of two e2m1 elements `[O_, I_/2]` under e8m0 scales `[O_, I_/32]` as fp32 `[O_, I_]`, exactly."""
    pair = pairs_OB.to(tl.int32)
    # The three bits of e2m1 as the lowest of fp32's exponent and the highest of its mantissa are the element times
    # 2^-126, subnormals included, since e2m1 has them as fp32 does. (A test looks that no product flushes them.)
    low = ((pair & 0x07) << 22) | ((pair & 0x08) << 28)
    high = ((pair & 0x70) << 18) | ((pair & 0x80) << 24)
    # An interleaved tile serves as either operand of `dot`, in both directions of training, and interleaving joins
    # registers of one thread. Even and odd inputs apart would need the rows in that order too.
    elements_OI = tl.interleave(low, high).to(tl.float32, bitcast=True) * 2.0**126

    scale = scales_OG.to(tl.int32)
    # 2^(s-127): an fp32 of exponent s, but for 0, where that is subnormal, and 255, which is NaN.
    bits = tl.where(scale == 0, 0x00400000, tl.where(scale == 255, 0x7FC00000, scale << 23))
    scale_OGV = tl.broadcast_to(bits.to(tl.float32, bitcast=True)[:, :, None], (O_, I_ // 32, 32))
    # A second product, because 2^126 times the scale can pass fp32's largest number.
    return elements_OI * scale_OGV.reshape(O_, I_)


@triton.jit
def _exact_cast(w, DTYPE: tl.constexpr):
    """Decoded weights in another dtype; in bf16 by dropping half their bits, which are zeros."""
    if tl.bfloat16 == DTYPE:
        # No rounding to do, and Triton's interpreter flushes subnormals when it rounds to bf16.
        return (w.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return w.to(DTYPE)


@triton.jit
def _load_weight(blocks, scales, row_O, in_O, i0, I: tl.constexpr, O_: tl.constexpr, I_: tl.constexpr):
    """Inputs `i0` to `i0 + I_` of the given rows of the stack, decoded; 0 outside `in_O` and I."""
    b = i0 // 2 + tl.arange(0, I_ // 2)
    g = i0 // 32 + tl.arange(0, I_ // 32)
    pairs_OB = tl.load(
        blocks + row_O[:, None] * (I // 2) + b[None, :], mask=in_O[:, None] & (b < I // 2)[None, :], other=0
    )
    scales_OG = tl.load(
        scales + row_O[:, None] * (I // 32) + g[None, :], mask=in_O[:, None] & (g < I // 32)[None, :], other=0
    )
    return _decode(pairs_OB, scales_OG, O_, I_)


@triton.jit
def grouped_linear_kernel(
    x,
    blocks,
    scales,
    bias,
    y,
    tiles_N3,
    O: tl.constexpr,
    I: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    OPERAND: tl.constexpr,
    T_: tl.constexpr,
    O_: tl.constexpr,
    I_: tl.constexpr,
):
    """y = x @ W[e].T + bias[e] for one tile of rows and O_ outputs."""
    # Programs that run together share their rows.
    tiles_of_O: tl.constexpr = tl.cdiv(O, O_)
    row_T, in_T, expert = tile_of_rows(tiles_N3, tl.program_id(0) // tiles_of_O, T_)
    o = tl.program_id(0) % tiles_of_O * O_ + tl.arange(0, O_)
    acc_TO = tl.zeros((T_, O_), tl.float32)
    for i0 in range(0, I, I_):
        w_OI = _exact_cast(_load_weight(blocks, scales, expert * O + o, o < O, i0, I, O_, I_), OPERAND)
        x_TI = load_rows(x, row_T, in_T, i0 + tl.arange(0, I_), I, OPERAND)
        acc_TO = tl.dot(x_TI, tl.trans(w_OI), acc_TO)
    if HAS_BIAS:
        acc_TO += tl.load(bias + expert * O + o, mask=o < O, other=0.0).to(tl.float32)[None, :]
    store_rows(y, acc_TO, row_T, in_T, o, O)


@triton.jit
def grouped_linear_dx_kernel(
    dy,
    blocks,
    scales,
    dx,
    tiles_N3,
    O: tl.constexpr,
    I: tl.constexpr,
    OPERAND: tl.constexpr,
    T_: tl.constexpr,
    O_: tl.constexpr,
    I_: tl.constexpr,
):
    """dx = dy @ W[e] for one tile of rows and I_ inputs."""
    tiles_of_I: tl.constexpr = tl.cdiv(I, I_)
    row_T, in_T, expert = tile_of_rows(tiles_N3, tl.program_id(0) // tiles_of_I, T_)
    i0 = tl.program_id(0) % tiles_of_I * I_
    acc_TI = tl.zeros((T_, I_), tl.float32)
    for o0 in range(0, O, O_):
        o = o0 + tl.arange(0, O_)
        w_OI = _exact_cast(_load_weight(blocks, scales, expert * O + o, o < O, i0, I, O_, I_), OPERAND)
        acc_TI = tl.dot(load_rows(dy, row_T, in_T, o, O, OPERAND), w_OI, acc_TI)
    store_rows(dx, acc_TI, row_T, in_T, i0 + tl.arange(0, I_), I)


@triton.jit(do_not_specialize=["num_blocks"])
def dequantize_kernel(blocks, scales, out, num_blocks, N_: tl.constexpr):
    """out = decoded blocks, N_ of them."""
    row_N = tl.program_id(0).to(tl.int64) * N_ + tl.arange(0, N_)
    in_N = row_N < num_blocks
    values_NV = _load_weight(blocks, scales, row_N, in_N, 0, 32, N_, 32)
    v = tl.arange(0, 32)
    tl.store(out + row_N[:, None] * 32 + v[None, :], _exact_cast(values_NV, out.dtype.element_ty), mask=in_N[:, None])


@triton.jit
def add_bias_kernel(product, bias, y, tiles_N3, O: tl.constexpr, T_: tl.constexpr, O_: tl.constexpr):
    """y = product + bias[e] for one tile of rows and O_ outputs."""
    tiles_of_O: tl.constexpr = tl.cdiv(O, O_)
    row_T, in_T, expert = tile_of_rows(tiles_N3, tl.program_id(0) // tiles_of_O, T_)
    o = tl.program_id(0) % tiles_of_O * O_ + tl.arange(0, O_)
    bias_O = tl.load(bias + expert * O + o, mask=o < O, other=0.0).to(tl.float32)
    store_rows(y, load_rows(product, row_T, in_T, o, O, tl.float32) + bias_O[None, :], row_T, in_T, o, O)
