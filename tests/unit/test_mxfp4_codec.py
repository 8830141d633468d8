"""MXFP4 coding against the format's definition, evaluated element by element in plain Python."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptoss_ft.kernels.codec import even_scales, pack_nibbles, quantize_mxfp4, unpack_nibbles
from gptoss_ft.kernels.reference import ELEMENTS, MAGNITUDES, dequantize_mxfp4


def random_packed(*leading, seed=0):
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (*leading, 16), dtype=torch.uint8, generator=generator)
    return blocks, torch.randint(100, 150, leading, dtype=torch.uint8, generator=generator)


def e2m1(code):
    """OCP MX v1.0, table 3: sign, two exponent bits of bias 1, one mantissa bit, subnormal at exponent 0."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    magnitude = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2 ** (exponent - 1)
    return -magnitude if sign else magnitude


def test_elements_follow_the_definition():
    assert list(ELEMENTS) == [e2m1(code) for code in range(16)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dequantize_follows_the_definition(dtype):
    blocks, scales = random_packed(2, 3, 4)
    scales = scales.clamp(116, 140)  # what fp16 can hold exactly
    values = dequantize_mxfp4(blocks, scales, dtype)
    assert values.shape == (2, 3, 128) and values.dtype == dtype
    for position, value in zip(torch.cartesian_prod(*map(torch.arange, (2, 3, 128))), values.flatten(), strict=True):
        lead, row, element = position.tolist()
        byte = int(blocks[lead, row, element // 32, element % 32 // 2])
        code = byte >> 4 if element % 2 else byte & 15
        assert float(value) == e2m1(code) * 2.0 ** (int(scales[lead, row, element // 32]) - 127)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_ends_of_the_scale_range(dtype):
    blocks = pack_nibbles(torch.arange(16, dtype=torch.uint8).repeat(2)).expand(3, 16)
    values = dequantize_mxfp4(blocks, torch.tensor([0, 254, 255], dtype=torch.uint8), dtype).view(3, 32)
    assert values[0, 1] == math.ldexp(0.5, -127)
    assert values[1, 2] == math.ldexp(1.0, 127)
    assert values[2].isnan().all()


def test_zero_has_a_sign():
    blocks = torch.full((1, 16), 0x80, dtype=torch.uint8)
    values = dequantize_mxfp4(blocks, torch.tensor([127], dtype=torch.uint8), torch.float32)
    assert torch.signbit(values).view(16, 2).tolist() == [[False, True]] * 16
    assert torch.equal(quantize_mxfp4(values, torch.tensor([127], dtype=torch.uint8))[0], blocks)


def test_nibbles_are_packed_low_first():
    codes = torch.tensor([1, 2, 15, 0], dtype=torch.uint8)
    assert pack_nibbles(codes).tolist() == [0x21, 0x0F]
    every_byte = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(pack_nibbles(unpack_nibbles(every_byte)), every_byte)


@given(
    values=st.lists(st.floats(-7, 7, width=32), min_size=32, max_size=32),
    exponent=st.integers(-100, 100),
)
def test_rounds_to_the_nearest_and_ties_to_even_codes(values, exponent):
    target = torch.tensor(values, dtype=torch.float64) * 2.0**exponent
    scale = torch.tensor([exponent + 127], dtype=torch.uint8)
    codes = unpack_nibbles(quantize_mxfp4(target, scale)[0]).flatten().tolist()
    for value, code in zip(values, codes, strict=True):
        distances = [abs(min(abs(value), 6.0) - magnitude) for magnitude in MAGNITUDES]
        nearest = [index for index, distance in enumerate(distances) if distance == min(distances)]
        wanted = nearest[0] if len(nearest) == 1 else next(index for index in nearest if index % 2 == 0)
        assert code & 7 == wanted
        assert code >> 3 == (math.copysign(1, value) < 0)


@pytest.mark.parametrize(
    ("amax", "exponent"),
    [(4.0, 0), (6.9999, 0), (7.0, 1), (2.0**-30, -32)],
)
def test_scales_step_between_grid_points(amax, exponent):
    values = torch.zeros(2, 64)
    values[1, 40] = -amax
    assert even_scales(values)[1, 1].item() == exponent + 127


def test_numbers_on_the_grid_survive_a_round_trip():
    blocks, scales = random_packed(5, 7, 3, seed=1)
    values = dequantize_mxfp4(blocks, scales, torch.float32)
    again = dequantize_mxfp4(*quantize_mxfp4(values), torch.float32)
    assert torch.equal(values, again)
    assert torch.equal(quantize_mxfp4(values, scales)[0], blocks)


def test_error_on_gaussian_weights_is_the_known_one():
    weights = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    error = (dequantize_mxfp4(*quantize_mxfp4(weights), torch.float32) - weights).norm() / weights.norm()
    assert 0.110 < error.item() < 0.115


def test_not_finite_blocks_become_nan():
    values = torch.ones(1, 96)
    values[0, 0], values[0, 40] = math.nan, math.inf
    decoded = dequantize_mxfp4(*quantize_mxfp4(values), torch.float32).view(3, 32)
    assert decoded[:2].isnan().all() and (decoded[2] == 1).all()


def test_blocks_and_scales_must_match():
    blocks, scales = random_packed(2, 4)
    with pytest.raises(ValueError, match="do not go with"):
        dequantize_mxfp4(blocks, scales[:, :3], torch.float32)
    with pytest.raises(ValueError, match="multiple of 32"):
        quantize_mxfp4(torch.zeros(3, 40))
