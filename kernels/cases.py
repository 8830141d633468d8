"""Random operands for each operation: small and awkward for its self-check, of gpt-oss-20b's shape for its speed.

T rows · E experts · I input features · O output features · G blocks of 32 inputs (I = 32·G) · B bytes per block (16)
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gptoss_ft.kernels.reference import BLOCK_SIZE, MXFP4Weight


@dataclass(frozen=True)
class Size:
    """Numbers from which operands are drawn."""

    rows_E: tuple[int, ...]
    inputs: int
    outputs: int

    @property
    def ends_E(self) -> list[int]:
        return list(accumulate(self.rows_E))


# Few rows, none, and rows that fill no tile; features that fill no panel, and an odd number of blocks.
AWKWARD = Size(rows_E=(3, 0, 19), inputs=288, outputs=96)
# gate_up of two or eight of gpt-oss-20b's experts, which takes a moment on either device.
GPT_OSS_20B_CPU = Size(rows_E=(64, 64), inputs=2880, outputs=5760)
GPT_OSS_20B_GPU = Size(rows_E=(256,) * 8, inputs=2880, outputs=5760)


class Draw:
    """A source of random tensors for one device and dtype; the same ones every time, and no global state is touched."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        # Drawn in fp32, so that bf16 operands are rounded like those of training.
        return torch.randn(shape, generator=self._generator, device=self.device, dtype=torch.float32).to(self.dtype)

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


GROUPED_LINEAR = Case(_grouped_linear, product_work)
GROUPED_LINEAR_DX = Case(_grouped_linear_dx, product_work)
DEQUANTIZE_MXFP4 = Case(_dequantize_mxfp4, decode_work)
