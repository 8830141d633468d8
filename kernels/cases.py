"""Random operands for each operation: small and awkward for its self-check, of gpt-oss-20b's shape for its speed.

T rows · E experts · I input features · O output features · G blocks of 32 inputs (I = 32·G) · B bytes per block (16)
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gptoss_ft.kernels.reference import BLOCK_SIZE, LayerWeights, MXFP4Weight, nearest_element


@dataclass(frozen=True)
class Size:
    """Numbers from which operands are drawn."""

    rows_E: tuple[int, ...]
    inputs: int
    outputs: int
    rank: int = 16
    # The dtype of LoRA's factors; None: that of the rows. PEFT's are fp32 beside bf16 rows, unless told otherwise.
    factors: torch.dtype | None = None
    # Whether dense products have one.
    bias: bool = True
    # Of attention: query heads for each key/value head, keys, and the window.
    heads: tuple[int, int] = (64, 8)
    head_dim: int = 64
    keys: int = 1024
    window: int = 128

    @property
    def ends_E(self) -> list[int]:
        return list(accumulate(self.rows_E))


# Few rows, none, and rows that fill no tile; features that fill no panel, and an odd number of blocks.
AWKWARD = Size(rows_E=(3, 0, 19), inputs=288, outputs=96, heads=(6, 2), head_dim=40, keys=75, window=9)
# For operations that take any number of features: no multiple of anything.
ODD = Size(rows_E=(3, 0, 19), inputs=313, outputs=102, rank=5, heads=(6, 2), head_dim=40, keys=75, window=9)
# gate_up of two or eight of gpt-oss-20b's experts, which takes a moment on either device.
GPT_OSS_20B_CPU = Size(rows_E=(64, 64), inputs=2880, outputs=5760)
GPT_OSS_20B_GPU = Size(rows_E=(256,) * 8, inputs=2880, outputs=5760)


class Draw:
    """A source of random tensors for one device and dtype; the same ones every time, and no global state is touched."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        # Drawn in fp32, so that bf16 operands are rounded like those of training.
        drawn = torch.randn(shape, generator=self._generator, device=self.device, dtype=torch.float32)
        return drawn.to(dtype or self.dtype)

    def whole(self, high: int, *shape: int) -> Tensor:
        """Integers from 0 up to `high`."""
        return torch.randint(high, shape, generator=self._generator, device=self.device)

    def packed(self, E: int, O: int, I: int) -> MXFP4Weight:
        """Weights with every code, and scales from 2^-12 to 2^-4."""
        G = I // BLOCK_SIZE
        return MXFP4Weight(self._bytes(0, 256, E, O, G, BLOCK_SIZE // 2), self._bytes(115, 124, E, O, G))

    def _bytes(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, dtype=torch.uint8, generator=self._generator, device=self.device)


class Call(NamedTuple):
    """Arguments of an operation; tensors are among `args`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = {}  # noqa: RUF012 - nobody changes it


class Work(NamedTuple):
    """What one call does, to be divided by its seconds: 10^9 floating-point operations, or bytes read and written."""

    amount: float
    unit: str


class Case(NamedTuple):
    """How to draw the arguments of an operation, and how much work they are at that size and in that dtype."""

    call: Callable[[Draw, Size], Call]
    work: Callable[[Size, torch.dtype], Work]


def product_work(size: Size, dtype: torch.dtype) -> Work:
    return Work(2e-9 * sum(size.rows_E) * size.inputs * size.outputs, "GFLOP/s")


def rows_work(rows: float) -> Callable[[Size, torch.dtype], Work]:
    """Reading and writing, together, `rows` times the output features of every row."""
    return lambda size, dtype: Work(1e-9 * rows * sum(size.rows_E) * size.outputs * dtype.itemsize, "GB/s")


def decode_work(size: Size, dtype: torch.dtype) -> Work:
    elements = len(size.rows_E) * size.outputs * size.inputs
    # Half a byte and a 32nd of a scale are read for each.
    return Work(1e-9 * elements * (0.5 + 1 / BLOCK_SIZE + dtype.itemsize), "GB/s")


def _grouped_linear(draw: Draw, size: Size) -> Call:
    T, E, I, O = sum(size.rows_E), len(size.rows_E), size.inputs, size.outputs
    return Call((draw.normal(T, I), draw.packed(E, O, I), draw.normal(E, O), size.ends_E))


def _grouped_linear_dx(draw: Draw, size: Size) -> Call:
    T, E, I, O = sum(size.rows_E), len(size.rows_E), size.inputs, size.outputs
    return Call((draw.normal(T, O), draw.packed(E, O, I), size.ends_E))


def _dequantize_mxfp4(draw: Draw, size: Size) -> Call:
    return Call((*draw.packed(len(size.rows_E), size.outputs, size.inputs), draw.dtype))


def _grouped_dense(draw: Draw, size: Size) -> Call:
    T, E, I, O = sum(size.rows_E), len(size.rows_E), size.inputs, size.outputs
    bias_EO = draw.normal(E, O) if size.bias else None
    return Call((draw.normal(T, I), draw.normal(E, O, I), bias_EO, size.ends_E))


def _grouped_dense_dx(draw: Draw, size: Size) -> Call:
    T, E, I, O = sum(size.rows_E), len(size.rows_E), size.inputs, size.outputs
    return Call((draw.normal(T, O), draw.normal(E, O, I), size.ends_E))


def _linear(draw: Draw, size: Size) -> Call:
    T, I, O = sum(size.rows_E), size.inputs, size.outputs
    return Call((draw.normal(T, I), draw.normal(O, I), draw.normal(O)))


def _linear_dx(draw: Draw, size: Size) -> Call:
    T, I, O = sum(size.rows_E), size.inputs, size.outputs
    return Call((draw.normal(T, O), draw.normal(O, I)))


def _cross_entropy(draw: Draw, size: Size) -> Call:
    T, V = sum(size.rows_E), size.outputs
    weights_T = draw.normal(T).float().abs()
    return Call((draw.normal(T, V), draw.whole(V, T), weights_T))


def _clamped_swiglu(draw: Draw, size: Size) -> Call:
    # Some beyond the limit of 7.
    return Call((4 * draw.normal(sum(size.rows_E), size.outputs),))


def _weighted_swiglu_backward(draw: Draw, size: Size) -> Call:
    T, O = sum(size.rows_E), size.outputs
    return Call((4 * draw.normal(T, O), draw.normal(T, O // 2), draw.normal(T).float()))


def _combine(draw: Draw, size: Size) -> Call:
    T = sum(size.rows_E)
    # Four experts a token.
    return Call((draw.normal(T, size.outputs), draw.whole(T, T // 2, 4), draw.normal(T // 2, 4)))


def _expert_mixture(draw: Draw, size: Size) -> Call:
    # Few tokens, as in a step of generation: one expert has several of them, and one has none.
    experts_TK = torch.tensor([[0, 2], [3, 0], [0, 2]], device=draw.device)
    E, H, I = 4, size.inputs, size.outputs
    weights_TK = draw.normal(*experts_TK.shape).softmax(-1)
    gate_up, down = (draw.packed(E, 2 * I, H), draw.normal(E, 2 * I)), (draw.packed(E, H, I), draw.normal(E, H))
    constants = {"alpha": 1.702, "limit": 7.0}
    return Call((draw.normal(len(experts_TK), H), experts_TK, weights_TK, *gate_up, *down), constants)


def mixture_work(size: Size, dtype: torch.dtype) -> Work:
    # Bytes of three experts, which are read once whatever the dtype.
    return Work(1e-9 * 3 * 3 * size.inputs * size.outputs * (0.5 + 1 / BLOCK_SIZE), "GB/s")


def _rms_norm(draw: Draw, size: Size) -> Call:
    # Few rows, of a step of generation.
    return Call((draw.normal(3, size.inputs), draw.normal(size.inputs), 1e-5))


def rms_norm_work(size: Size, dtype: torch.dtype) -> Work:
    return Work(1e-9 * 2 * 3 * size.inputs * dtype.itemsize, "GB/s")


def _attention_inputs(draw: Draw, size: Size) -> Call:
    # Few rows, of a step of generation.
    T, (H, K), D, I = 3, size.heads, size.head_dim, size.inputs
    projections = [draw.normal(*shape) for heads in (H, K, K) for shape in ((heads * D, I), (heads * D,))]
    angles_TC = draw.normal(T, D // 2)
    return Call((draw.normal(T, I), *projections, angles_TC.cos(), angles_TC.sin()))


def attention_inputs_work(size: Size, dtype: torch.dtype) -> Work:
    (H, K), D = size.heads, size.head_dim
    return Work(1e-9 * (H + 2 * K) * D * size.inputs * dtype.itemsize, "GB/s")


def _decoder_layer(draw: Draw, size: Size) -> Call:
    B, T, S, E, (N, K), D, H, I = 1, 3, size.keys, 3, size.heads, size.head_dim, size.inputs, size.outputs
    weights = LayerWeights(
        input_norm_H=draw.normal(H),
        # Small enough for sums of the size of their terms.
        query_OH=draw.normal(N * D, H) * H**-0.5,
        query_bias_O=draw.normal(N * D),
        key_OH=draw.normal(K * D, H) * H**-0.5,
        key_bias_O=draw.normal(K * D),
        value_OH=draw.normal(K * D, H) * H**-0.5,
        value_bias_O=draw.normal(K * D),
        sinks_N=draw.normal(N),
        projection_HW=draw.normal(H, N * D) * (N * D) ** -0.5,
        projection_bias_H=draw.normal(H),
        norm_H=draw.normal(H),
        # Logits so far apart that no rounding changes which experts are chosen.
        router_EH=draw.normal(E, H) * 2**-9,
        router_bias_E=(draw.normal(E) * 2**-9 + torch.arange(E, device=draw.device) / 2).to(draw.dtype),
        gate_up=draw.packed(E, 2 * I, H),
        gate_up_bias_EO=draw.normal(E, 2 * I),
        down=draw.packed(E, H, I),
        down_bias_EH=draw.normal(E, H),
        head_dim=D,
        window=size.window,
        scaling=D**-0.5,
        input_epsilon=1e-5,
        epsilon=1e-5,
        top_k=2,
        alpha=1.702,
        limit=7.0,
    )
    angles_BTC = draw.normal(B, T, D // 2)
    states = draw.normal(B, T, H), draw.normal(B, K, S, D), draw.normal(B, K, S, D)
    return Call((*states, angles_BTC.cos(), angles_BTC.sin(), weights))


def decoder_layer_work(size: Size, dtype: torch.dtype) -> Work:
    (N, K), D, H = size.heads, size.head_dim, size.inputs
    dense, experts = 2 * (N + K) * D * H * dtype.itemsize, 2 * 3 * H * size.outputs * (0.5 + 1 / BLOCK_SIZE)
    return Work(1e-9 * (dense + experts), "GB/s")


def _low_rank_down(draw: Draw, size: Size) -> Call:
    T, E, I = sum(size.rows_E), len(size.rows_E), size.inputs
    return Call((draw.normal(T, I), draw.normal(E, size.rank, I, dtype=size.factors), size.ends_E))


def _low_rank_up_(draw: Draw, size: Size) -> Call:
    T, E, O, R = sum(size.rows_E), len(size.rows_E), size.outputs, size.rank
    h_TR, factor_ERO = draw.normal(T, R, dtype=torch.float32), draw.normal(E, R, O, dtype=size.factors)
    return Call((draw.normal(T, O), h_TR, factor_ERO, 0.5, size.ends_E))


def _low_rank_gradient_(draw: Draw, size: Size) -> Call:
    T, E, I, R = sum(size.rows_E), len(size.rows_E), size.inputs, size.rank
    d_factor_ERI = torch.full((E, R, I), torch.nan, dtype=size.factors or draw.dtype, device=draw.device)
    return Call((d_factor_ERI, draw.normal(T, R, dtype=torch.float32), draw.normal(T, I), 0.5, size.ends_E))


def _sink_attention(draw: Draw, size: Size) -> Call:
    (H, K), D, S = size.heads, size.head_dim, size.keys
    tensors = (draw.normal(2, H, S, D), draw.normal(2, K, S, D), draw.normal(2, K, S, D), draw.normal(H))
    # Two documents and padding.
    documents_BS = torch.arange(S, device=draw.device).mul(5).div(2 * S, rounding_mode="floor").expand(2, S)
    documents_BS = documents_BS.where(documents_BS < 2, -1).contiguous()
    return Call(tensors, {"scaling": D**-0.5, "window": size.window, "documents_BS": documents_BS})


def attention_work(size: Size, dtype: torch.dtype) -> Work:
    return Work(4e-9 * 2 * size.heads[0] * size.head_dim * size.keys * min(size.window, size.keys), "GFLOP/s")


def low_rank_work(size: Size, dtype: torch.dtype) -> Work:
    return Work(2e-9 * sum(size.rows_E) * size.inputs * size.rank, "GFLOP/s")


def _round_columns(draw: Draw, size: Size) -> Call:
    O, K = size.outputs, min(size.inputs, 128)
    steps_OK = torch.exp2(draw.normal(O, 1).round()).expand(O, K).contiguous()
    spread_KK = draw.normal(K, K).div(K**0.5).triu(1)
    wanted_OK = 3 * draw.normal(O, K)
    return Call((wanted_OK, wanted_OK + draw.normal(O, K), steps_OK, spread_KK))


def rounding_work(size: Size, dtype: torch.dtype) -> Work:
    return Work(1e-9 * size.outputs * min(size.inputs, 128) ** 2, "GFLOP/s")


def _descend_(draw: Draw, size: Size) -> Call:
    O, K = size.outputs, size.inputs
    steps_OK = torch.exp2(draw.normal(O, 1).round()).expand(O, K).contiguous()
    half_KK = draw.normal(K, K).div(2 * K**0.5)
    moment_KK = half_KK @ half_KK.T + torch.eye(K, dtype=half_KK.dtype, device=half_KK.device)
    rounded_OK = nearest_element(3 * draw.normal(O, K))
    # Some numbers are not the best.
    gradient_OK = 0.15 * steps_OK * draw.normal(O, K)
    return Call((rounded_OK * steps_OK, gradient_OK, steps_OK, moment_KK, 1))


def descent_work(size: Size, dtype: torch.dtype) -> Work:
    return Work(1e-9 * 0.05 * size.outputs * size.inputs**2, "GFLOP/s")


def _merge_mxfp4(draw: Draw, size: Size) -> Call:
    E, I, O, R = len(size.rows_E), size.inputs, size.outputs, size.rank
    weight = draw.packed(E, O, I)
    # Zeros of either sign, and blocks whose scale "even" halves.
    weight.blocks_EOGB[:, : O // 4] &= 0xBB
    # Updates of about a step, the largest scale's and the smallest's.
    return Call((weight, draw.normal(E, R, I), draw.normal(E, O, R) * 2**-6, R**-0.5))


def _merge_bf16(draw: Draw, size: Size) -> Call:
    I, O, R = size.inputs, size.outputs, size.rank
    A_RI, B_OR = draw.normal(R, I, dtype=size.factors), draw.normal(O, R, dtype=size.factors) * 2**-6
    return Call((draw.normal(O, I), A_RI, B_OR, R**-0.5))


def merge_mxfp4_work(size: Size, dtype: torch.dtype) -> Work:
    return Work(2e-9 * len(size.rows_E) * size.outputs * size.inputs * size.rank, "GFLOP/s")


def merge_bf16_work(size: Size, dtype: torch.dtype) -> Work:
    return Work(2e-9 * size.outputs * size.inputs * size.rank, "GFLOP/s")


GROUPED_LINEAR = Case(_grouped_linear, product_work)
GROUPED_LINEAR_DX = Case(_grouped_linear_dx, product_work)
DEQUANTIZE_MXFP4 = Case(_dequantize_mxfp4, decode_work)
GROUPED_DENSE = Case(_grouped_dense, product_work)
GROUPED_DENSE_DX = Case(_grouped_dense_dx, product_work)
LINEAR = Case(_linear, product_work)
LINEAR_DX = Case(_linear_dx, product_work)
CROSS_ENTROPY = Case(_cross_entropy, rows_work(2))
CLAMPED_SWIGLU = Case(_clamped_swiglu, rows_work(1.5))
WEIGHTED_SWIGLU_BACKWARD = Case(_weighted_swiglu_backward, rows_work(3))
COMBINE = Case(_combine, rows_work(2.5))
EXPERT_MIXTURE = Case(_expert_mixture, mixture_work)
RMS_NORM = Case(_rms_norm, rms_norm_work)
ATTENTION_INPUTS = Case(_attention_inputs, attention_inputs_work)
DECODER_LAYER = Case(_decoder_layer, decoder_layer_work)
LOW_RANK_DOWN = Case(_low_rank_down, low_rank_work)
LOW_RANK_UP_ = Case(_low_rank_up_, low_rank_work)
LOW_RANK_GRADIENT_ = Case(_low_rank_gradient_, low_rank_work)
SINK_ATTENTION = Case(_sink_attention, attention_work)
ROUND_COLUMNS = Case(_round_columns, rounding_work)
DESCEND_ = Case(_descend_, descent_work)
MERGE_MXFP4 = Case(_merge_mxfp4, merge_mxfp4_work)
MERGE_BF16 = Case(_merge_bf16, merge_bf16_work)
