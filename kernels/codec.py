"""Encode MXFP4: e2m1 elements in blocks of 32 that share one power-of-two scale (OCP MX v1.0).

Shape suffixes: O rows · G blocks of a row · B bytes of a block (16) · V elements of a block (32).
Leading dimensions, such as experts, are free. A byte holds two elements, the even one in its low nibble.
The decoder is `gptoss_ft.kernels.reference.dequantize_mxfp4`. Everything here works on any device, and in one go:
a caller with more rows than memory splits them.
"""

import torch
from torch import Tensor

from gptoss_ft.kernels.reference import BLOCK_SIZE, SCALE_BIAS, SCALE_NAN, scale_values

SIGN_BIT = 8


def quantize_mxfp4(
    values: Tensor, scales: Tensor | None = None, dither_GV: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Round `values` [..., 32·G] to the nearest MXFP4 numbers: blocks [..., G, 16] and scales [..., G], uint8.

    A tie goes to the even code, what exceeds 6·scale saturates, and zeros keep their sign.
    A block that holds NaN or infinity becomes NaN (scale 255).

    Args:
        scales: the scales to use; by default those of `even_scales`.
        dither_GV: [..., G, 32] in [0, 1). With it numbers between two of the grid round away from zero if the share of
            the step from the lower one, plus the dither, reaches 1; and towards zero otherwise.
    """
    values = values if values.dtype == torch.float64 else values.float()
    if scales is None:
        scales = even_scales(values)
    values_GV = _in_blocks(values)
    unit = scale_values((2 * SCALE_BIAS - scales.int()).clamp_min(0), values.dtype)
    scaled_GV = values_GV * unit.unsqueeze(-1)
    codes = _nearest_codes(scaled_GV) if dither_GV is None else _dithered_codes(scaled_GV, dither_GV)
    return pack_nibbles(codes), scales


def even_scales(values: Tensor) -> Tensor:
    """Scales [..., G] of `values` [..., 32·G] that let the largest element round to a power of two before they grow.

    The exponent is floor(log2(amax)) - 2, one more when amax is at least 1.75 powers of two. It steps between
    grid points, so small changes to numbers that are on the grid do not change it.
    """
    mantissa, exponent = _amax_parts(values)
    return _as_scale_bytes(exponent - 3 + (mantissa >= 0.875).int(), mantissa)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Pack uint8 codes 0..15 [..., 2·B] into bytes [..., B], the even element in the low nibble."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse of `pack_nibbles`: bytes [..., B] to codes 0..15 [..., 2·B]."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


def _in_blocks(values: Tensor) -> Tensor:
    if values.shape[-1] % BLOCK_SIZE:
        raise ValueError(f"the last dimension of {tuple(values.shape)} is not a multiple of {BLOCK_SIZE}")
    return values.unflatten(-1, (-1, BLOCK_SIZE))


def _amax_parts(values: Tensor) -> tuple[Tensor, Tensor]:
    """Each block's largest magnitude as mantissa [0.5, 1) and exponent."""
    return torch.frexp(_in_blocks(values if values.dtype == torch.float64 else values.float()).abs().amax(-1))


def _as_scale_bytes(exponent: Tensor, mantissa: Tensor) -> Tensor:
    clamped = (exponent + SCALE_BIAS).clamp(0, SCALE_NAN - 1)
    clamped = torch.where(mantissa == 0, 0, clamped)
    return torch.where(mantissa.isfinite(), clamped, SCALE_NAN).to(torch.uint8)


def _nearest_codes(scaled: Tensor) -> Tensor:
    """e2m1 codes of numbers in units of the scale."""
    # Magnitude codes lie on the lines 2a up to 2, a + 2 up to 4 and a/2 + 4 beyond: the lowest line at a is its own.
    # round() breaks ties to even integers, here the codes; this takes a third of the time of a search.
    magnitude = scaled.abs()
    codes = torch.minimum((magnitude * 2).round_(), magnitude.round().add_(2))
    codes = torch.minimum(codes, magnitude.mul_(0.5).round_().add_(4))
    return _with_signs(codes, scaled)


def _dithered_codes(scaled: Tensor, dither: Tensor) -> Tensor:
    magnitude = scaled.abs()
    position = torch.minimum(torch.minimum(magnitude * 2, magnitude + 2), magnitude * 0.5 + 4)
    return _with_signs((position + dither).floor_(), scaled)


def _with_signs(codes: Tensor, scaled: Tensor) -> Tensor:
    codes = codes.clamp_max_(SIGN_BIT - 1)
    return (codes.to(torch.uint8) & (SIGN_BIT - 1)) | (torch.signbit(scaled).to(torch.uint8) * SIGN_BIT)
