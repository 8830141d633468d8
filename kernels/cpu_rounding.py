"""Rounding column after column in the compiled library. O rows · K columns · N elements of what a change moves"""

import torch
from torch import Tensor

from gptoss_ft.kernels.cpu_library import INT, ISAS, LONG, POINTER, check, current_isa, function

MAX_COLUMNS = 128


def round_columns(
    wanted_OK: Tensor, steps_OK: Tensor, spread_KK: Tensor, old_OK: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`reference.round_columns` in fp32."""
    rounded_OK = wanted_OK.clone(memory_format=torch.contiguous_format)
    residuals_OK = torch.empty_like(rounded_OK)
    rows, columns = rounded_OK.shape
    # isa, threads, wanted, old, steps, spread, each with its stride, residuals, rows, columns
    call = function("gptoss_ft_round_columns", INT, INT, *4 * (POINTER, LONG), POINTER, LONG, LONG)
    old = (None, 0) if old_OK is None else (old_OK.data_ptr(), old_OK.stride(0))
    operands = ((tensor.data_ptr(), tensor.stride(0)) for tensor in (steps_OK, spread_KK))
    isa, threads = ISAS.index(current_isa()), torch.get_num_threads()
    pointers = (rounded_OK.data_ptr(), rounded_OK.stride(0), *old, *(part for pair in operands for part in pair))
    check(call(isa, threads, *pointers, residuals_OK.data_ptr(), rows, columns))
    return rounded_OK, residuals_OK


def add_sparse_product_(out_ON: Tensor, sparse_OK: Tensor, rows_KN: Tensor) -> Tensor:
    """`reference.add_sparse_product_` in fp32."""
    # isa, threads, three matrices with their strides, O, K, N
    call = function("gptoss_ft_add_sparse_product", INT, INT, *3 * (POINTER, LONG), LONG, LONG, LONG)
    matrices = ((tensor.data_ptr(), tensor.stride(0)) for tensor in (out_ON, sparse_OK, rows_KN))
    isa, threads = ISAS.index(current_isa()), torch.get_num_threads()
    check(call(isa, threads, *(part for pair in matrices for part in pair), *sparse_OK.shape, rows_KN.shape[1]))
    return out_ON


def product_refusal(out_ON: Tensor, sparse_OK: Tensor, rows_KN: Tensor) -> str:
    """Why the library cannot take these operands; empty if it can."""
    if out_ON.shape != (len(sparse_OK), rows_KN.shape[1]) or sparse_OK.shape[1] != len(rows_KN):
        return "the shapes do not fit"  # the reference says how
    return _refuses_layout(out_ON, sparse_OK, rows_KN)


def refusal(wanted_OK: Tensor, steps_OK: Tensor, spread_KK: Tensor, old_OK: Tensor | None) -> str:
    """Why the library cannot take these operands; empty if it can."""
    given = [tensor for tensor in (wanted_OK, steps_OK, spread_KK, old_OK) if tensor is not None]
    if wanted_OK.shape[1] > MAX_COLUMNS:
        return f"it takes {MAX_COLUMNS} columns at once, not {wanted_OK.shape[1]}: split them"
    return _refuses_layout(*given)


def _refuses_layout(*operands: Tensor) -> str:
    if any(tensor.dtype != torch.float32 for tensor in operands):
        return "it computes in fp32 only: convert the operands"
    if any(tensor.stride(1) != 1 for tensor in operands):
        return "the elements of a row are not neighbours: make the operands contiguous"
    return ""
