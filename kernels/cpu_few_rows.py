"""Dense products of few rows in the compiled library, as a step of generation needs them.

T tokens · I in features · O out features · D head dimension · C half of it
"""

from torch import Tensor

from gptoss_ft.kernels.cpu_library import DTYPES, INT, LONG, MAX_TOKENS, POINTER, check, common, function

MAX_HEAD_DIM = 256  # `kMaxHeadDim` of cpu/few_rows.h


def takes(x_TI: Tensor, w_OI: Tensor, bias_O: Tensor | None) -> bool:
    """Whether `linear` computes these operands; they may be too many rows, or a mistake."""
    fitting = x_TI.ndim == w_OI.ndim == 2 and x_TI.shape[1] == w_OI.shape[1] and 0 < x_TI.shape[0] <= MAX_TOKENS
    known = x_TI.dtype in DTYPES and w_OI.dtype in DTYPES and w_OI.is_contiguous() and w_OI.numel() > 0
    return fitting and known and (bias_O is None or (bias_O.shape == w_OI.shape[:1] and bias_O.dtype in DTYPES))


def linear(x_TI: Tensor, w_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """`reference.linear` of what it `takes`, with the bits of `grouped_dense`."""
    (T, I), O = x_TI.shape, w_OI.shape[0]
    x_TI, bias_O = x_TI.contiguous(), None if bias_O is None else bias_O.contiguous()
    y_TO = x_TI.new_empty(T, O)
    # isa, threads, dtype, x, T, weight dtype, weight, bias, its dtype, O, I, y
    types = (INT, INT, INT, POINTER, LONG, INT, POINTER, POINTER, INT, LONG, LONG, POINTER)
    status = function("gptoss_ft_few_rows_linear", *types)(
        *common(x_TI.dtype),
        x_TI.data_ptr(),
        T,
        DTYPES[w_OI.dtype],
        w_OI.data_ptr(),
        None if bias_O is None else bias_O.data_ptr(),
        0 if bias_O is None else DTYPES[bias_O.dtype],
        O,
        I,
        y_TO.data_ptr(),
    )
    check(status)
    return y_TO


def refusal(x_TI: Tensor, *operands: Tensor) -> str:
    """Why the library does not take these operands of `attention_inputs`; empty if it does."""
    *projections, cos_TC, sin_TC = operands
    if not 0 < len(x_TI) <= MAX_TOKENS:
        return f"there are {len(x_TI)} rows, not 1 to {MAX_TOKENS}"
    if 2 * cos_TC.shape[-1] > MAX_HEAD_DIM:
        return f"head dimension {2 * cos_TC.shape[-1]} is more than {MAX_HEAD_DIM}"
    if len({w_OI.dtype for w_OI in projections[::2]}) > 1 or len({bias_O.dtype for bias_O in projections[1::2]}) > 1:
        return "weights or biases have different dtypes"
    if any(t.dtype not in DTYPES for t in projections) or not x_TI.dtype == cos_TC.dtype == sin_TC.dtype:
        return "weights or biases are not fp32 or bf16, or the rotation is not in the dtype of the rows"
    # A copy would double the memory of the weights.
    return "" if all(t.is_contiguous() for t in projections) else "weights or biases are not contiguous"


def attention_inputs(
    x_TI: Tensor,
    query_OI: Tensor,
    query_bias_O: Tensor,
    key_OI: Tensor,
    key_bias_O: Tensor,
    value_OI: Tensor,
    value_bias_O: Tensor,
    cos_TC: Tensor,
    sin_TC: Tensor,
) -> Tensor:
    """`reference.attention_inputs` of what `refusal` lets pass; nothing is rounded before it is rotated.

    Raises:
        ValueError: if shapes do not fit together.
    """
    (T, I), D = x_TI.shape, 2 * cos_TC.shape[-1]
    projections = ((query_OI, query_bias_O), (key_OI, key_bias_O), (value_OI, value_bias_O))
    for w_OI, bias_O in projections:
        if w_OI.shape != (len(bias_O), I) or len(bias_O) % D:
            shapes = tuple(w_OI.shape), tuple(bias_O.shape)
            raise ValueError(f"weight and bias {shapes} must be [heads * {D}, {I}] and [heads * {D}]")
    if cos_TC.shape != (T, D // 2) or sin_TC.shape != cos_TC.shape:
        raise ValueError(f"cos {tuple(cos_TC.shape)} and sin {tuple(sin_TC.shape)} must be {(T, D // 2)}")
    x_TI, cos_TC, sin_TC = x_TI.contiguous(), cos_TC.contiguous(), sin_TC.contiguous()
    y_TO = x_TI.new_empty(T, sum(len(bias_O) for _, bias_O in projections))
    # isa, threads, dtype, x, T, weight dtype, bias dtype
    types = [INT, INT, INT, POINTER, LONG, INT, INT]
    # weight, bias and heads of each projection, I, D, cos, sin, y
    types += (*(POINTER, POINTER, LONG) * 3, LONG, LONG, POINTER, POINTER, POINTER)
    status = function("gptoss_ft_attention_inputs", *types)(
        *common(x_TI.dtype),
        x_TI.data_ptr(),
        T,
        DTYPES[query_OI.dtype],
        DTYPES[query_bias_O.dtype],
        *(part for w_OI, bias_O in projections for part in (w_OI.data_ptr(), bias_O.data_ptr(), len(bias_O) // D)),
        I,
        D,
        cos_TC.data_ptr(),
        sin_TC.data_ptr(),
        y_TO.data_ptr(),
    )
    check(status)
    return y_TO
