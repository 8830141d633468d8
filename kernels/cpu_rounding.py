"""Rounding column after column in the compiled library. O rows · K columns"""

import torch
from torch import Tensor

from gptoss_ft.kernels.cpu_library import INT, ISAS, LONG, POINTER, check, current_isa, function

MAX_COLUMNS = 128


def round_columns(wanted_OK: Tensor, target_OK: Tensor, steps_OK: Tensor, spread_KK: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.round_columns` in fp32."""
    rounded_OK = wanted_OK.clone(memory_format=torch.contiguous_format)
    errors_OK = torch.empty_like(rounded_OK)
    # isa, threads, wanted, target, steps, spread, each with its stride, errors, rows, columns
    call = function("gptoss_ft_round_columns", INT, INT, *4 * (POINTER, LONG), POINTER, LONG, LONG)
    matrices = _with_strides(rounded_OK, target_OK, steps_OK, spread_KK)
    isa, threads = ISAS.index(current_isa()), torch.get_num_threads()
    check(call(isa, threads, *matrices, errors_OK.data_ptr(), *rounded_OK.shape))
    return rounded_OK, errors_OK


def descend_(
    rounded_OK: Tensor, gradient_OK: Tensor, steps_OK: Tensor, moment_KK: Tensor, max_passes: int
) -> tuple[Tensor, Tensor]:
    """`reference.descend_` in fp32."""
    # isa, threads, four matrices with their strides, rows, columns, passes
    call = function("gptoss_ft_descend", INT, INT, *4 * (POINTER, LONG), LONG, LONG, LONG)
    matrices = _with_strides(rounded_OK, gradient_OK, steps_OK, moment_KK)
    isa, threads = ISAS.index(current_isa()), torch.get_num_threads()
    check(call(isa, threads, *matrices, *rounded_OK.shape, max_passes))
    return rounded_OK, gradient_OK


def refusal(wanted_OK: Tensor, target_OK: Tensor, steps_OK: Tensor, spread_KK: Tensor) -> str:
    """Why the library cannot sweep these operands; empty if it can."""
    if wanted_OK.shape[1] > MAX_COLUMNS:
        return f"it takes {MAX_COLUMNS} columns at once, not {wanted_OK.shape[1]}: split them"
    return _refuses_layout(wanted_OK, target_OK, steps_OK, spread_KK)


def descent_refusal(
    rounded_OK: Tensor, gradient_OK: Tensor, steps_OK: Tensor, moment_KK: Tensor, max_passes: int
) -> str:
    """Why the library cannot descend with these operands; empty if it can."""
    if not rounded_OK.shape == gradient_OK.shape == steps_OK.shape or moment_KK.shape != 2 * rounded_OK.shape[1:]:
        return "the shapes do not fit"  # the reference says how
    return _refuses_layout(rounded_OK, gradient_OK, steps_OK, moment_KK)


def _with_strides(*matrices: Tensor) -> list[int]:
    return [part for matrix in matrices for part in (matrix.data_ptr(), matrix.stride(0))]


def _refuses_layout(*operands: Tensor) -> str:
    if any(tensor.dtype != torch.float32 for tensor in operands):
        return "it computes in fp32 only: convert the operands"
    if any(tensor.stride(1) != 1 for tensor in operands):
        return "the elements of a row are not neighbours: make the operands contiguous"
    return ""
