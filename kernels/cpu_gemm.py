"""Products of the compiled CPU library with expert weights, packed or dense, for fp32 or bf16 rows.

Each function has the name, signature and meaning of one in `reference`, and sums in fp32 in an order that no number of
threads changes. T rows · I input features · O output features · E experts · G blocks of 32 inputs (I = 32·G) · B bytes
per block (16)
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from gptoss_ft.kernels import cpu_few_rows
from gptoss_ft.kernels.cpu_library import DTYPES, INT, LONG, POINTER, check, common, function
from gptoss_ft.kernels.reference import BLOCK_SIZE, MXFP4Weight

MXFP4 = 2  # as a type of weights, after those in DTYPES


class _Stack(NamedTuple):
    """Weights as the library takes them."""

    dtype: int
    weights: Tensor
    scales: Tensor | None
    shape: tuple[int, int, int]


def grouped_linear(x_TI: Tensor, weight: MXFP4Weight, bias_EO: Tensor | None, ends_E: Sequence[int]) -> Tensor:
    """`reference.grouped_linear`.

    Raises:
        ValueError: if shapes or `ends_E` do not fit together.
    """
    return _forward(x_TI, _packed(weight), bias_EO, ends_E)


def grouped_linear_dx(dy_TO: Tensor, weight: MXFP4Weight, ends_E: Sequence[int]) -> Tensor:
    """`reference.grouped_linear_dx`, checked as `grouped_linear` is."""
    return _dx(dy_TO, _packed(weight), ends_E)


def grouped_dense(x_TI: Tensor, w_EOI: Tensor, bias_EO: Tensor | None, ends_E: Sequence[int]) -> Tensor:
    """`reference.grouped_dense` for contiguous fp32 or bf16 weights of any size, at any address.

    Raises:
        ValueError: if shapes or `ends_E` do not fit together, or the weights have other strides or another dtype.
    """
    return _forward(x_TI, _dense(w_EOI), bias_EO, ends_E)


def grouped_dense_dx(dy_TO: Tensor, w_EOI: Tensor, ends_E: Sequence[int]) -> Tensor:
    """`reference.grouped_dense_dx`, checked as `grouped_dense` is."""
    return _dx(dy_TO, _dense(w_EOI), ends_E)


def linear(x_TI: Tensor, w_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """`reference.linear`, checked as `grouped_dense` is."""
    if cpu_few_rows.takes(x_TI, w_OI, bias_O):
        return cpu_few_rows.linear(x_TI, w_OI, bias_O)
    return grouped_dense(x_TI, w_OI[None], None if bias_O is None else bias_O[None], [x_TI.shape[0]])


def linear_dx(dy_TO: Tensor, w_OI: Tensor) -> Tensor:
    """`reference.linear_dx`, checked as `grouped_dense` is."""
    return grouped_dense_dx(dy_TO, w_OI[None], [dy_TO.shape[0]])


def _packed(weight: MXFP4Weight) -> _Stack:
    E, O, G, B = weight.blocks_EOGB.shape
    if weight.scales_EOG.shape != (E, O, G) or B != BLOCK_SIZE // 2:
        blocks, scales = tuple(weight.blocks_EOGB.shape), tuple(weight.scales_EOG.shape)
        raise ValueError(f"blocks {blocks} and scales {scales} are not [E, O, G, 16] and [E, O, G]")
    if O % BLOCK_SIZE:
        raise ValueError(f"{O} output features are no multiple of {BLOCK_SIZE}")
    return _Stack(MXFP4, weight.blocks_EOGB, weight.scales_EOG, (E, O, G * BLOCK_SIZE))


def _dense(w_EOI: Tensor) -> _Stack:
    if w_EOI.ndim != 3 or 0 in w_EOI.shape or w_EOI.dtype not in DTYPES or not w_EOI.is_contiguous():
        raise ValueError(
            f"weights {tuple(w_EOI.shape)} of {w_EOI.dtype} with strides {w_EOI.stride()} must be [E, O, I], "
            "contiguous, not empty, and fp32 or bf16"
        )
    E, O, I = w_EOI.shape
    return _Stack(DTYPES[w_EOI.dtype], w_EOI, None, (E, O, I))


def _forward(x_TI: Tensor, stack: _Stack, bias_EO: Tensor | None, ends_E: Sequence[int]) -> Tensor:
    E, O, I = stack.shape
    _check_rows(x_TI, E, I, ends_E)
    if bias_EO is not None and bias_EO.shape != (E, O):
        raise ValueError(f"bias {tuple(bias_EO.shape)} must be {(E, O)}")
    x_TI = x_TI.contiguous()
    bias = None if bias_EO is None else (bias_EO if bias_EO.dtype in DTYPES else bias_EO.float()).contiguous()
    y_TO = x_TI.new_empty(x_TI.shape[0], O)
    # isa, threads, dtype, x, weight dtype, weights, scales, bias, its dtype, ends, E, O, I, y
    types = (INT, INT, INT, POINTER, INT, POINTER, POINTER, POINTER, INT, POINTER, LONG, LONG, LONG, POINTER)
    status = function("gptoss_ft_grouped_linear", *types)(
        *common(x_TI.dtype),
        x_TI.data_ptr(),
        *_pointers(stack),
        None if bias is None else bias.data_ptr(),
        0 if bias is None else DTYPES[bias.dtype],
        (LONG * E)(*ends_E),
        *stack.shape,
        y_TO.data_ptr(),
    )
    check(status)
    return y_TO


def _dx(dy_TO: Tensor, stack: _Stack, ends_E: Sequence[int]) -> Tensor:
    E, O, I = stack.shape
    _check_rows(dy_TO, E, O, ends_E)
    dy_TO = dy_TO.contiguous()
    dx_TI = dy_TO.new_empty(dy_TO.shape[0], I)
    # isa, threads, dtype, dy, weight dtype, weights, scales, ends, E, O, I, dx
    types = (INT, INT, INT, POINTER, INT, POINTER, POINTER, POINTER, LONG, LONG, LONG, POINTER)
    status = function("gptoss_ft_grouped_linear_dx", *types)(
        *common(dy_TO.dtype),
        dy_TO.data_ptr(),
        *_pointers(stack),
        (LONG * E)(*ends_E),
        *stack.shape,
        dx_TI.data_ptr(),
    )
    check(status)
    return dx_TI


def _pointers(stack: _Stack) -> tuple[int, int, int | None]:
    return stack.dtype, stack.weights.data_ptr(), None if stack.scales is None else stack.scales.data_ptr()


def _check_rows(rows: Tensor, E: int, width: int, ends_E: Sequence[int]) -> None:
    """Refuse whatever else the library would read or write out of bounds for."""
    if rows.ndim != 2 or rows.shape[1] != width or rows.dtype not in DTYPES:
        raise ValueError(f"rows {tuple(rows.shape)} of {rows.dtype} must be [T, {width}] of fp32 or bf16")
    if len(ends_E) != E or list(ends_E) != sorted(ends_E) or min(ends_E) < 0 or max(ends_E) != rows.shape[0]:
        raise ValueError(f"ends_E must be {E} numbers that rise to {rows.shape[0]}, not {list(ends_E)}")
