"""The Triton kernels in Triton's interpreter, on the CPU, against the reference in fp64.

`test_triton_kernels` runs this file in a process of its own: whether Triton interprets is settled when it is imported.

The interpreter rounds fp32 to bf16 by dropping bits, which errs up to twice as much as a GPU, so bf16 results may err
four times as much as plain torch. With fp32 rows, which GPUs do not get, the bound is the usual one.
"""

from itertools import accumulate

import pytest
import torch
from torch import Tensor

from gptoss_ft.kernels import reference
from gptoss_ft.kernels.gpu import mxfp4_kernels, packed_experts
from gptoss_ft.kernels.reference import MXFP4Weight

FUSED, IN_CHUNKS = str(10**9), "0"
# O and I: one block; outputs that fill no 8 and no tile; more than one tile of both and an odd number of blocks.
CASES = [
    (32, 32, torch.float32),
    (36, 96, torch.bfloat16),
    (136, 160, torch.float32),
    (136, 160, torch.bfloat16),
]
# No expert, one and several; each size of tile (16, 64, 128 rows per expert), with remainders.
ROWS = [(0, 0), (0, 1, 0), (3, 0, 19), (17, 70, 0, 64), (300, 0, 1)]
MARGIN = {torch.float32: 2, torch.bfloat16: 4}


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh tensors hold NaN, so an element that no kernel writes shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    assert torch.zeros(1).new_empty(4, 8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[FUSED, IN_CHUNKS], ids=["fused", "chunks"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(packed_experts.FUSED_ROWS_VARIABLE, request.param)
    return request.param


def random_weight(E: int, O: int, I: int, scales: tuple[int, int] = (115, 123)) -> MXFP4Weight:
    blocks = torch.randint(0, 256, (E, O, I // 32, 16), dtype=torch.uint8)
    return MXFP4Weight(blocks, torch.randint(scales[0], scales[1] + 1, (E, O, I // 32), dtype=torch.uint8))


def fenced(tensor: Tensor) -> Tensor:
    """The same numbers in the middle of NaN, which a kernel reads if it strays."""
    padding = torch.full((64, *tensor.shape[1:]), float("nan"), dtype=tensor.dtype)
    return torch.cat((padding, tensor, padding))[64:-64]


def assert_as_exact_as_torch(ours: Tensor, plain: Tensor, truth: Tensor) -> None:
    assert ours.shape == truth.shape and ours.dtype == plain.dtype
    if truth.numel() == 0:
        return
    error, usual = ((t.double() - truth).abs().max() for t in (ours, plain))
    budget = max(MARGIN[ours.dtype] * usual, truth.abs().max() * 2**-20)
    assert error <= budget, f"{error:.2e} > {budget:.2e}"


@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize(("O", "I", "dtype"), CASES)
@pytest.mark.usefixtures("way")
def test_products_err_like_plain_torch(O, I, rows, dtype, monkeypatch):
    ends, E = list(accumulate(rows)), len(rows)
    # Room for two experts: several chunks, the last of them shorter, and some without rows.
    monkeypatch.setattr(packed_experts, "CHUNK_BYTES", 2 * O * I * dtype.itemsize)
    weight, bias = random_weight(E, O, I), torch.randn(E, O, dtype=dtype)
    x, dy = torch.randn(ends[-1], I, dtype=dtype), torch.randn(ends[-1], O, dtype=dtype)
    for bias_EO in (bias, None):
        assert_as_exact_as_torch(
            packed_experts.grouped_linear(fenced(x), weight, bias_EO, ends),
            reference.grouped_linear(x, weight, bias_EO, ends),
            reference.grouped_linear(x.double(), weight, None if bias_EO is None else bias_EO.double(), ends),
        )
    assert_as_exact_as_torch(
        packed_experts.grouped_linear_dx(fenced(dy), weight, ends),
        reference.grouped_linear_dx(dy, weight, ends),
        reference.grouped_linear_dx(dy.double(), weight, ends),
    )


@pytest.mark.parametrize("dtype", packed_experts.DECODED_DTYPES, ids=str)
def test_decode_has_the_bits_of_the_reference_for_every_scale_and_code(dtype):
    # 4,080 blocks: the last program has a remainder.
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).repeat(255, 1, 1)
    scales = torch.arange(255, dtype=torch.uint8)[:, None].repeat(1, 16)
    ours, theirs = (f(blocks, scales, dtype) for f in (packed_experts.dequantize_mxfp4, reference.dequantize_mxfp4))
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    assert ours.shape == theirs.shape and torch.equal(ours.view(integer), theirs.view(integer))
    assert packed_experts.dequantize_mxfp4(blocks[:1], torch.full_like(scales[:1], 255), dtype).isnan().all()
    assert packed_experts.dequantize_mxfp4(blocks[:0], scales[:0], dtype).shape == (0, 512)


@pytest.mark.parametrize("scales", [(0, 1), (20, 40), (251, 254), (0, 254), (0, 255)], ids=str)
@pytest.mark.usefixtures("way")
def test_extreme_scales_neither_vanish_nor_stay_finite_by_mistake(scales):
    weight, ends = random_weight(2, 64, 96, scales), [15, 17]
    weight.scales_EOG[1].fill_(120)
    weight.scales_EOG[1, 40, 1] = scales[0]
    weight.scales_EOG[1, 41, 2] = scales[1]
    for product, features, rest in (("grouped_linear", 96, (None, ends)), ("grouped_linear_dx", 64, (ends,))):
        rows = torch.randn(17, features)
        ours = getattr(packed_experts, product)(rows, weight, *rest)
        plain, truth = (getattr(reference, product)(tensor, weight, *rest) for tensor in (rows, rows.double()))
        assert not (truth.isnan() & ours.isfinite()).any()
        # fp32 sums overflow before fp64 ones, and not in every order at the same place: far below, nothing may.
        assert ours.isfinite()[truth.abs() < 1e36].all() or scales[1] > 250
        both = ours.isfinite() & plain.isfinite() & truth.isfinite()
        size = truth.abs().nan_to_num(0, 0, 0).amax(0, keepdim=True)
        assert ((ours.double() - truth).abs() / size)[both].max() < 2**-18
        assert ((ours != 0) == (truth != 0))[both].all()


def test_offsets_past_the_range_of_32_bits():
    # Memory that nobody touches costs nothing; fresh tensors must not be filled.
    torch.use_deterministic_algorithms(False)
    E, O, I, T = 300, 5760, 2880, 800_000
    shape = (E, O, I // 32)
    weight = MXFP4Weight(torch.empty(*shape, 16, dtype=torch.uint8), torch.empty(shape, dtype=torch.uint8))
    small = random_weight(1, O, I)
    weight.blocks_EOGB[-1], weight.scales_EOG[-1] = small.blocks_EOGB[0], small.scales_EOG[0]
    assert weight.blocks_EOGB.numel() > 2**31 and T * I > 2**31
    x_TI, y_TO = torch.empty(T, I, dtype=torch.bfloat16), torch.empty(T, O, dtype=torch.bfloat16)
    x_TI[-3:] = torch.randn(3, I)
    tiles_N3 = torch.tensor([[T - 3, 3, E - 1]], dtype=torch.int32)
    # One program of each: the first 128 outputs, and the first 128 inputs.
    tile = {"O": O, "I": I, "OPERAND": mxfp4_kernels.tl.float32, **packed_experts.FORWARD_TILES[0]._asdict()}
    mxfp4_kernels.grouped_linear_kernel[(1,)](x_TI, *weight, None, y_TO, tiles_N3, HAS_BIAS=False, **tile)
    truth = reference.grouped_linear(x_TI[-3:].float(), MXFP4Weight(*(part[:, :128] for part in small)), None, [3])
    torch.testing.assert_close(y_TO[-3:, :128].float(), truth, rtol=2**-7, atol=1e-3)

    y_TO[-3:] = torch.randn(3, O)
    tile |= packed_experts.BACKWARD_TILES[0]._asdict()
    mxfp4_kernels.grouped_linear_dx_kernel[(1,)](y_TO, *weight, x_TI, tiles_N3, **tile)
    truth = reference.grouped_linear_dx(y_TO[-3:].float(), MXFP4Weight(*(part[:, :, :4] for part in small)), [3])
    torch.testing.assert_close(x_TI[-3:, :128].float(), truth, rtol=2**-7, atol=1e-3)


@pytest.mark.usefixtures("way")
def test_rows_of_any_strides_and_addresses_and_a_bias_of_any_dtype():
    weight, ends = random_weight(2, 64, 32), [2, 5]
    x = torch.randn(5, 32, dtype=torch.bfloat16)
    expected = packed_experts.grouped_linear(x, weight, None, ends)
    strided = x.t().contiguous().t()
    odd_address = torch.cat((torch.zeros(1), x.flatten())).to(torch.bfloat16)[1:].view(5, 32)
    assert not strided.is_contiguous() and odd_address.data_ptr() % 16
    for rows in (strided, odd_address):
        found = packed_experts.grouped_linear(rows, weight, None, ends)
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-4)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        bias = torch.full((2, 64), 1024.0, dtype=dtype)
        biased = packed_experts.grouped_linear(x, weight, bias, ends)
        torch.testing.assert_close(biased.float(), expected.float() + 1024, rtol=2**-7, atol=0)


def test_what_does_not_fit_together_is_told():
    weight, x = random_weight(2, 64, 64), torch.randn(5, 64)
    for rows, packed, bias, ends in (
        (x[:, :16], weight, None, [2, 5]),
        (x, weight, None, [2, 4]),
        (x, weight, None, [6, 5]),
        (x, weight, torch.zeros(2, 32), [2, 5]),
        (x, MXFP4Weight(weight.blocks_EOGB, weight.scales_EOG[:, :32]), None, [2, 5]),
        (x, MXFP4Weight(weight.blocks_EOGB.mT.contiguous().mT, weight.scales_EOG), None, [2, 5]),
    ):
        with pytest.raises(ValueError, match=r"must be|are not"):
            packed_experts.grouped_linear(rows, packed, bias, ends)
    with pytest.raises(ValueError, match="do not go with"):
        packed_experts.dequantize_mxfp4(weight.blocks_EOGB, weight.scales_EOG[:1], torch.bfloat16)
