"""Triton kernels that merge low-rank updates into frozen weights; `kernels/gpu/merging.py` launches them.

`kernels/merging.py` is the definition, to the last bit. So products and sums are separate fp32 operations in ascending
order of the ranks: launch these without contraction to fused multiply-adds. Tensor cores sum in another order.

R LoRA rank · E experts · O out rows · I in columns · G blocks of a row · P pairs of elements of a block (16)
Constants of a tile end in an underscore. The even elements of a block and its odd ones are kept apart: they are the low
and the high nibbles of its bytes.
"""

import triton
import triton.language as tl

from gptoss_ft.kernels.gpu.mxfp4_kernels import _exact_cast


@triton.jit
def _power_of_two(scale):
    """2^(scale - 127) for scales 0 to 254, in fp32."""
    return tl.where(scale == 0, 0x00400000, scale << 23).to(tl.float32, bitcast=True)


@triton.jit
def _element(code):
    """The e2m1 number of each code: its bits are an fp32 that is 2^-126 of it."""
    return (((code & 7) << 22) | ((code & 8) << 28)).to(tl.float32, bitcast=True) * 2.0**126


@triton.jit
def _magnitude_and_sign(value):
    """Magnitudes, at most 8, and the sign as that of a code."""
    bits = value.to(tl.int32, bitcast=True)
    return tl.minimum((bits & 0x7FFFFFFF).to(tl.float32, bitcast=True), 8.0), (bits >> 28) & 8


@triton.jit
def _nearest_code(value):
    """Ties go to even codes. Magnitudes lie on the lines 2a, a + 2 and a / 2 + 4; adding 1.5 · 2^23 rounds."""
    a, sign = _magnitude_and_sign(value)
    first = (a * 2.0 + 12582912.0) - 12582912.0
    second = ((a + 12582912.0) - 12582912.0) + 2.0
    third = ((a * 0.5 + 12582912.0) - 12582912.0) + 4.0
    return tl.minimum(tl.minimum(first, tl.minimum(second, third)), 7.0).to(tl.int32) | sign


@triton.jit
def _dithered_code(value, dither):
    """The code at or below a magnitude, or the one above it: `dither` shares of a step are added."""
    a, sign = _magnitude_and_sign(value)
    position = tl.minimum(a * 2.0, tl.minimum(a + 2.0, a * 0.5 + 4.0))
    return tl.minimum(position + dither, 7.0).to(tl.int32) | sign


@triton.jit
def _low_and_high_half(sum_OP, O_: tl.constexpr, P: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(sum_OP, (O_, 2, P // 2)), (0, 2, 1)))


@triton.jit
def _squared_error(even_OP, odd_OP, scale_O, wanted_even_OP, wanted_odd_OP, O_: tl.constexpr):
    """Of each block, `[O_]` in fp64, added up in the order of the definition."""
    step_O1 = _power_of_two(scale_O)[:, None]
    even = (_element(even_OP) * step_O1 - wanted_even_OP).to(tl.float64)
    odd = (_element(odd_OP) * step_O1 - wanted_odd_OP).to(tl.float64)
    # Squares of fp32 numbers are exact, fused or not.
    low, high = _low_and_high_half(even * even + odd * odd, O_, 16)
    low, high = _low_and_high_half(low + high, O_, 8)
    low, high = _low_and_high_half(low + high, O_, 4)
    low, high = tl.split(low + high)
    return low + high


@triton.jit
def _mixed(start_O, word_O):
    start_O = (start_O ^ word_O) * 0x9E3779B9
    return start_O ^ (start_O >> 15)


@triton.jit
def _dither_starts(bytes_OP, O_: tl.constexpr):
    """The hash of a block's bytes from which its thresholds start, uint32 `[O_]`."""
    shifts = (tl.arange(0, 4) * 8).to(tl.uint32)
    words_O4 = tl.sum(tl.reshape(bytes_OP.to(tl.uint32), (O_, 4, 4)) << shifts[None, None, :], axis=2)
    first_and_third, second_and_fourth = tl.split(tl.reshape(words_O4, (O_, 2, 2)))
    first, third = tl.split(first_and_third)
    second, fourth = tl.split(second_and_fourth)
    return _mixed(_mixed(_mixed(_mixed(tl.zeros_like(first), first), second), third), fourth)


@triton.jit
def _threshold(start_O, v):
    place = start_O[:, None] + v.to(tl.uint32)[None, :] * 0x9E3779B9
    return (place >> 16).to(tl.float32) * 2.0**-16


@triton.jit(do_not_specialize=["E", "R"])
def merge_mxfp4_kernel(
    blocks,
    scales,
    A,
    B,
    experts_N,
    out_blocks,
    out_scales,
    E,
    R,
    O: tl.constexpr,
    G: tl.constexpr,
    DITHERED: tl.constexpr,
    O_: tl.constexpr,
):
    """Base + B[:, e] @ A[e] in O_ rows of one column of blocks of one of `experts_N`, rounded near the base.

    Args:
        A: fp32 `[E, R, 32·G]`.
        B: fp32 `[R, E, O]`, multiplied by the scaling.
    """
    # Programs that run together are neighbours in memory.
    tiles_of_O: tl.constexpr = tl.cdiv(O, O_)
    g = tl.program_id(0) % G
    tile = tl.program_id(0) // G
    expert = tl.load(experts_N + tile // tiles_of_O).to(tl.int64)
    o = tile % tiles_of_O * O_ + tl.arange(0, O_)
    in_O = o < O
    pair = tl.arange(0, 16)

    from_A = A + (expert * R * G + g) * 32 + 2 * pair
    from_B = B + expert * O + o
    b_O1 = tl.load(from_B, mask=in_O, other=0.0)[:, None]
    even_OP = b_O1 * tl.load(from_A)[None, :]
    odd_OP = b_O1 * tl.load(from_A + 1)[None, :]
    for _ in range(1, R):
        from_A += G * 32
        from_B += E.to(tl.int64) * O
        b_O1 = tl.load(from_B, mask=in_O, other=0.0)[:, None]
        even_OP += b_O1 * tl.load(from_A)[None, :]
        odd_OP += b_O1 * tl.load(from_A + 1)[None, :]

    block_O = (expert * O + o) * G + g
    place_OP = block_O[:, None] * 16 + pair[None, :]
    bytes_OP = tl.load(blocks + place_OP, mask=in_O[:, None], other=0)
    base_even_OP, base_odd_OP = bytes_OP.to(tl.int32) & 15, bytes_OP.to(tl.int32) >> 4
    base_scale_O = tl.load(scales + block_O, mask=in_O, other=0).to(tl.int32)
    step_O1 = _power_of_two(base_scale_O)[:, None]
    even_OP = _element(base_even_OP) * step_O1 + even_OP
    odd_OP = _element(base_odd_OP) * step_O1 + odd_OP

    bits_OP = tl.maximum(
        even_OP.to(tl.int32, bitcast=True) & 0x7FFFFFFF, odd_OP.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    )
    amax_O = tl.max(bits_OP, axis=1)
    finite_O = (amax_O < 0x7F800000) & (base_scale_O != 255)
    # The "even" rule: the exponent of the largest magnitude, one more from 1.75 on.
    even_scale_O = tl.maximum((amax_O >> 23) - 2 + ((amax_O & 0x7FFFFF) >= 0x600000).to(tl.int32), 0)
    differs_O = finite_O & (even_scale_O != base_scale_O)
    scale_O = base_scale_O
    if tl.max(differs_O.to(tl.int32), axis=0) > 0:
        unit_O1 = _power_of_two(254 - base_scale_O)[:, None]
        kept_O = _squared_error(
            _nearest_code(even_OP * unit_O1), _nearest_code(odd_OP * unit_O1), base_scale_O, even_OP, odd_OP, O_
        )
        unit_O1 = _power_of_two(254 - even_scale_O)[:, None]
        rescaled_O = _squared_error(
            _nearest_code(even_OP * unit_O1), _nearest_code(odd_OP * unit_O1), even_scale_O, even_OP, odd_OP, O_
        )
        scale_O = tl.where(differs_O & (rescaled_O < kept_O), even_scale_O, base_scale_O)

    unit_O1 = _power_of_two(254 - scale_O)[:, None]
    if DITHERED:
        start_O = _dither_starts(bytes_OP, O_)
        even_code_OP = _dithered_code(even_OP * unit_O1, _threshold(start_O, 2 * pair))
        odd_code_OP = _dithered_code(odd_OP * unit_O1, _threshold(start_O, 2 * pair + 1))
    else:
        even_code_OP = _nearest_code(even_OP * unit_O1)
        odd_code_OP = _nearest_code(odd_OP * unit_O1)
    # Zeros that stay zeros keep their signs.
    even_code_OP = tl.where(((even_code_OP | base_even_OP) & 7) == 0, base_even_OP, even_code_OP)
    odd_code_OP = tl.where(((odd_code_OP | base_odd_OP) & 7) == 0, base_odd_OP, odd_code_OP)
    merged_OP = tl.where(finite_O[:, None], even_code_OP | (odd_code_OP << 4), bytes_OP.to(tl.int32))
    tl.store(out_blocks + place_OP, merged_OP.to(tl.uint8), mask=in_O[:, None])
    tl.store(out_scales + block_O, tl.where(finite_O, scale_O, 255).to(tl.uint8), mask=in_O)


@triton.jit
def _rounded_to_bf16(value):
    """The nearest bf16 numbers, in fp32; by their bits, because Triton's interpreter drops what it should round."""
    bits = value.to(tl.int32, bitcast=True)
    bits = tl.where(value == value, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
    return ((bits >> 16) << 16).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["R"])
def merge_bf16_kernel(weight, A, B, out, R, O: tl.constexpr, I: tl.constexpr, O_: tl.constexpr, I_: tl.constexpr):
    """The bf16 numbers nearest to weight + B @ A in O_ rows of I_ columns; A is fp32 `[R, I]`, B fp32 `[R, O]`."""
    tiles_of_I: tl.constexpr = tl.cdiv(I, I_)
    o = tl.program_id(0) // tiles_of_I * O_ + tl.arange(0, O_)
    i = tl.program_id(0) % tiles_of_I * I_ + tl.arange(0, I_)
    from_A, from_B = A + i, B + o
    update_OI = tl.load(from_B, mask=o < O, other=0.0)[:, None] * tl.load(from_A, mask=i < I, other=0.0)[None, :]
    for _ in range(1, R):
        from_A += I
        from_B += O
        update_OI += tl.load(from_B, mask=o < O, other=0.0)[:, None] * tl.load(from_A, mask=i < I, other=0.0)[None, :]
    place_OI = o.to(tl.int64)[:, None] * I + i[None, :]
    mask_OI = (o < O)[:, None] & (i < I)[None, :]
    merged_OI = tl.load(weight + place_OI, mask=mask_OI, other=0.0).to(tl.float32) + update_OI
    tl.store(out + place_OI, _exact_cast(_rounded_to_bf16(merged_OI), out.dtype.element_ty), mask=mask_OI)
