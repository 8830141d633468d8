"""Products with dense experts on NVIDIA GPUs: torch's grouped_mm multiplies the rows of all experts in one call.

T rows, sorted by expert · E experts · I input features · O output features
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from gptoss_ft.kernels.gpu import device
from gptoss_ft.kernels.gpu.launch import on_device


def unavailable(where: torch.device, dtype: torch.dtype) -> str:
    """Why these products cannot run there on rows of `dtype`; empty if they can."""
    return device.unsuitable(where, dtype, (torch.bfloat16,))


def refuses_dx(rows: Tensor, w_EOI: Tensor, *_: object) -> str:
    """Why grouped_mm cannot take these tensors; empty if it can."""
    if w_EOI.dtype != rows.dtype:
        return f"rows and weights have different dtypes, {rows.dtype} and {w_EOI.dtype}"
    if not w_EOI.is_contiguous():
        # A copy would double their memory.
        return "weights are not contiguous"
    if any(features * rows.element_size() % 16 for features in w_EOI.shape[1:]):
        return f"{w_EOI.shape[1]} or {w_EOI.shape[2]} features are no multiple of 16 bytes"
    if any(tensor.data_ptr() % 16 for tensor in (rows, w_EOI)):
        return "rows or weights do not start at a multiple of 16 bytes"
    return ""


def refusal(rows: Tensor, w_EOI: Tensor, bias_EO: Tensor | None, *_: object) -> str:
    """`refuses_dx`, and biases."""
    # Added to what is rounded already, it would be rounded twice.
    return "grouped_mm adds no bias" if bias_EO is not None else refuses_dx(rows, w_EOI)


def grouped_dense(x_TI: Tensor, w_EOI: Tensor, bias_EO: Tensor | None, ends_E: Sequence[int]) -> Tensor:
    """`reference.grouped_dense` of what `refusal` lets through."""
    return _grouped_mm(x_TI, w_EOI.mT, ends_E)


def grouped_dense_dx(dy_TO: Tensor, w_EOI: Tensor, ends_E: Sequence[int]) -> Tensor:
    """`reference.grouped_dense_dx` of what `refuses_dx` lets through."""
    return _grouped_mm(dy_TO, w_EOI, ends_E)


def _grouped_mm(rows: Tensor, weights: Tensor, ends_E: Sequence[int]) -> Tensor:
    if not len(rows):
        return rows.new_empty(0, weights.shape[2])
    return F.grouped_mm(rows.contiguous(), weights, offs=on_device(ends_E, rows.device))
