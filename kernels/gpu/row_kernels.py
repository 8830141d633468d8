"""Triton kernels of the expert block for single rows, its activation and combination; `rows` launches them.

T rows, or tokens of K choices · I columns
Constants of a tile end in an underscore. Everything is computed in fp32. Offsets are 64-bit.
"""

import triton
import triton.language as tl


@triton.jit
def _load_gate_up(pairs, first, end, N_: tl.constexpr):
    """gate and up of N_ columns, which alternate in memory, in fp32; 0 from `end` on."""
    n = first + tl.arange(0, 2 * N_)
    return tl.split(tl.load(pairs + n, mask=n < end, other=0.0).to(tl.float32).reshape(N_, 2))


@triton.jit
def _clamp(gate, up, limit):
    # Comparisons and not minima, which would take the limit for NaN.
    up = tl.where(up < -limit, -limit, up)
    return tl.where(gate > limit, limit, gate), tl.where(up > limit, limit, up)


@triton.jit(do_not_specialize=["num_columns"])
def clamped_swiglu_kernel(gate_up, act, num_columns, alpha, limit, N_: tl.constexpr):
    """act = (up + 1) * gate * sigmoid(alpha * gate), clamped, for N_ of all rows' columns."""
    first = tl.program_id(0).to(tl.int64) * N_
    gate, up = _load_gate_up(gate_up, 2 * first, 2 * num_columns.to(tl.int64), N_)
    gate, up = _clamp(gate, up, limit)
    value = (up + 1) * gate * tl.sigmoid(alpha * gate)
    n = first + tl.arange(0, N_)
    tl.store(act + n, value.to(act.dtype.element_ty), mask=n < num_columns)


@triton.jit
def weighted_swiglu_backward_kernel(
    gate_up, d_z, weights, z, d_gate_up, d_weights, alpha, limit, I: tl.constexpr, I_: tl.constexpr
):
    """z = weight * act again, and the gradients of gate_up and of the weight, for one row."""
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights + row)
    d_weight_I = tl.zeros((I_,), tl.float32)
    for i0 in range(0, I, I_):
        i = i0 + tl.arange(0, I_)
        raw_gate, raw_up = _load_gate_up(gate_up + row * 2 * I, 2 * i0, 2 * I, I_)
        gate, up = _clamp(raw_gate, raw_up, limit)
        d_z_I = tl.load(d_z + row * I + i, mask=i < I, other=0.0).to(tl.float32)
        share = tl.sigmoid(alpha * gate)
        glu = gate * share
        act, d_act = (up + 1) * glu, d_z_I * weight
        d_gate = d_act * (up + 1) * (share + alpha * glu * (1 - share)) * (raw_gate <= limit).to(tl.float32)
        d_up = d_act * glu * (tl.abs(raw_up) <= limit).to(tl.float32)
        d_weight_I += d_z_I * act
        tl.store(z + row * I + i, (act * weight).to(z.dtype.element_ty), mask=i < I)
        pair = 2 * i0 + tl.arange(0, 2 * I_)
        d_pairs = tl.join(d_gate, d_up).reshape(2 * I_).to(d_gate_up.dtype.element_ty)
        tl.store(d_gate_up + row * 2 * I + pair, d_pairs, mask=pair < 2 * I)
    tl.store(d_weights + row, tl.sum(d_weight_I))


@triton.jit(do_not_specialize=["num_rows"])
def combine_kernel(
    y, slots, weights, out, num_rows, K: tl.constexpr, I: tl.constexpr, HAS_WEIGHTS: tl.constexpr, I_: tl.constexpr
):
    """out[t] = sum of weights[t, k] * y[slots[t, k]] over k, for one token and I_ columns."""
    tiles_of_I: tl.constexpr = tl.cdiv(I, I_)
    choice = tl.program_id(0).to(tl.int64) // tiles_of_I * K
    i = tl.program_id(0) % tiles_of_I * I_ + tl.arange(0, I_)
    sum_I = tl.zeros((I_,), tl.float32)
    for k in tl.static_range(K):
        slot = tl.load(slots + choice + k).to(tl.int64)
        # To tell the host of a wrong slot would stop both until it has looked.
        columns = tl.where((slot >= 0) & (slot < num_rows), I, 0)
        y_I = tl.load(y + slot * I + i, mask=i < columns, other=float("nan")).to(tl.float32)
        if HAS_WEIGHTS:
            y_I *= tl.load(weights + choice + k).to(tl.float32)
        sum_I += y_I
    tl.store(out + choice // K * I + i, sum_I.to(out.dtype.element_ty), mask=i < I)
