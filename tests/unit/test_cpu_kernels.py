"""Every path of the CPU library against the torch reference in fp64."""

from itertools import accumulate, product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gptoss_ft.kernels import cpu_gemm, cpu_library, reference
from gptoss_ft.kernels.reference import MXFP4Weight

built = pytest.mark.skipif(cpu_library.library() is None, reason="the CPU library was not built: no C++ compiler")

# O and I: the smallest; tails of strips (128 and 256), of slices of the sums (256), and an odd number of blocks.
SHAPES = [(32, 32), (96, 160), (288, 544)]
# None, one, the dot-product path (up to 4), tiles of 6 and 14 with remainders, and more than one block of 512.
ROWS = [(0, 0), (1, 0, 3), (4, 5, 0, 14, 15), (530, 2)]


def random_weight(E: int, O: int, I: int, scales: tuple[int, int] = (115, 123)) -> MXFP4Weight:
    blocks = torch.randint(0, 256, (E, O, I // 32, 16), dtype=torch.uint8)
    return MXFP4Weight(blocks, torch.randint(scales[0], scales[1] + 1, (E, O, I // 32), dtype=torch.uint8))


def random_dense(E: int, O: int, I: int, dtype: torch.dtype) -> Tensor:
    """Weights between NaNs, off the alignment of fresh tensors."""
    padded = torch.full((E * O * I + 8,), torch.nan, dtype=dtype)
    weight = padded[4:-4].view(E, O, I)
    return weight.copy_(torch.randn(E, O, I))


def assert_as_exact_as_torch(ours: Tensor, plain: Tensor, truth: Tensor) -> None:
    if truth.numel() == 0:
        assert ours.shape == truth.shape
        return
    error, budget = ((t.double() - truth).abs().max() for t in (ours, plain))
    # fp32 torch adds up in more partial sums than there are registers here, and at these sizes hardly errs at all.
    floor = truth.abs().max() * 2**-20
    assert error <= max(2 * budget, floor), f"{error:.2e} > 2 x {budget:.2e}"


@built
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poisoned_memory", "isa")
def test_products_err_at_most_twice_as_much_as_plain_torch(shape, rows, dtype):
    torch.manual_seed(0)
    (O, I), ends, E = shape, list(accumulate(rows)), len(rows)
    weight, bias = random_weight(E, O, I), torch.randn(E, O, dtype=dtype)
    x, dy = torch.randn(ends[-1], I, dtype=dtype), torch.randn(ends[-1], O, dtype=dtype)
    assert_as_exact_as_torch(
        cpu_gemm.grouped_linear(x, weight, bias, ends),
        reference.grouped_linear(x, weight, bias, ends),
        reference.grouped_linear(x.double(), weight, bias.double(), ends),
    )
    assert_as_exact_as_torch(
        cpu_gemm.grouped_linear_dx(dy, weight, ends),
        reference.grouped_linear_dx(dy, weight, ends),
        reference.grouped_linear_dx(dy.double(), weight, ends),
    )


# Weights narrower than a step of depth, tails of everything, and no tail at all.
@built
@pytest.mark.parametrize("dtypes", list(product((torch.bfloat16, torch.float32), repeat=2)), ids=str)
@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (13, 7), (100, 261), (263, 150), (288, 544)], ids=str)
@pytest.mark.usefixtures("poisoned_memory", "isa")
def test_dense_products_of_any_size_err_at_most_twice_as_much_as_plain_torch(shape, rows, dtypes):
    torch.manual_seed(0)
    (O, I), ends, E, (dtype, weight_dtype) = shape, list(accumulate(rows)), len(rows), dtypes
    weight, bias = random_dense(E, O, I, weight_dtype), torch.randn(E, O, dtype=weight_dtype)
    x, dy = torch.randn(ends[-1], I, dtype=dtype), torch.randn(ends[-1], O, dtype=dtype)
    assert_as_exact_as_torch(
        cpu_gemm.grouped_dense(x, weight, bias, ends),
        reference.grouped_dense(x, weight, bias, ends),
        reference.grouped_dense(x.double(), weight.double(), bias.double(), ends),
    )
    assert_as_exact_as_torch(
        cpu_gemm.grouped_dense_dx(dy, weight, ends),
        reference.grouped_dense_dx(dy, weight, ends),
        reference.grouped_dense_dx(dy.double(), weight.double(), ends),
    )


@built
@pytest.mark.usefixtures("isa")
def test_one_dense_weight_is_a_stack_of_one():
    weight, bias = random_dense(1, 100, 64, torch.bfloat16), torch.randn(1, 100)
    x, dy = torch.randn(9, 64, dtype=torch.bfloat16), torch.randn(9, 100, dtype=torch.bfloat16)
    assert torch.equal(cpu_gemm.linear(x, weight[0], bias[0]), cpu_gemm.grouped_dense(x, weight, bias, [9]))
    assert torch.equal(cpu_gemm.linear(x, weight[0], None), cpu_gemm.grouped_dense(x, weight, None, [9]))
    assert torch.equal(cpu_gemm.linear_dx(dy, weight[0]), cpu_gemm.grouped_dense_dx(dy, weight, [9]))


@built
@pytest.mark.usefixtures("isa")
def test_bias_may_have_another_dtype_or_be_absent():
    weight, x = random_weight(2, 64, 32), torch.randn(5, 32, dtype=torch.bfloat16)
    plain = cpu_gemm.grouped_linear(x, weight, None, [2, 5])
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        biased = cpu_gemm.grouped_linear(x, weight, torch.full((2, 64), 1024.0, dtype=dtype), [2, 5])
        torch.testing.assert_close(biased.float(), plain.float() + 1024, rtol=2**-8, atol=0)


@built
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.usefixtures("poisoned_memory", "isa")
def test_decode_has_the_bits_of_the_reference_for_every_scale_and_code(dtype):
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).repeat(256, 1, 1)
    scales = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 16)
    ours, theirs = cpu_library.decode(blocks, scales, dtype), reference.dequantize_mxfp4(blocks, scales, dtype)
    assert ours.shape == theirs.shape
    assert ours[255].isnan().all() and theirs[255].isnan().all()
    integer = torch.int16 if dtype == torch.bfloat16 else torch.int32
    assert torch.equal(ours[:255].view(integer), theirs[:255].view(integer))


@built
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("scales", [(0, 1), (20, 40), (251, 254), (0, 254), (0, 255)], ids=str)
@pytest.mark.usefixtures("isa")
def test_extreme_scales_neither_vanish_nor_stay_finite_by_mistake(scales, rows, dtype):
    torch.manual_seed(1)
    weight = random_weight(2, 64, 288, scales)
    # One extreme block among many ordinary ones must be noticed too.
    weight.scales_EOG[1].fill_(120)
    weight.scales_EOG[1, 40, 3] = scales[0]
    weight.scales_EOG[1, 41, 8] = scales[1]
    x, dy = (torch.randn(rows, n).to(dtype) for n in (288, 64))
    ends = [rows - 2, rows]
    magnitude = MXFP4Weight(weight.blocks_EOGB & 0x77, weight.scales_EOG)
    for name, rows_TN in (("grouped_linear", (x, None)), ("grouped_linear_dx", (dy,))):
        ours = getattr(cpu_gemm, name)(rows_TN[0], weight, *rows_TN[1:], ends)
        truth = getattr(reference, name)(rows_TN[0].double(), weight, *rows_TN[1:], ends)
        # The sum of the terms' magnitudes, which the error of a sum is measured by.
        size = getattr(reference, name)(rows_TN[0].double().abs(), magnitude, *rows_TN[1:], ends)
        assert torch.equal(truth.isnan() & ours.isfinite(), torch.zeros_like(truth, dtype=torch.bool))
        finite = ours.isfinite() & truth.isfinite()
        assert ((ours.double() - truth).abs() / size)[finite].max() < (2**-8 if dtype == torch.bfloat16 else 2**-20)
        # fp32 sums overflow before fp64 ones; far below that limit nothing may.
        assert ours.isfinite()[truth.abs() < 1e36].all() or scales[1] > 250


@built
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.usefixtures("isa")
def test_every_number_of_threads_gives_the_same_bits(dtype):
    torch.manual_seed(2)
    weight, dense, ends = random_weight(3, 96, 320), random_dense(3, 90, 320, torch.bfloat16), [37, 37, 40]
    x, dy = torch.randn(40, 320).to(dtype), torch.randn(40, 96).to(dtype)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(
            (
                cpu_gemm.grouped_linear(x, weight, None, ends),
                cpu_gemm.grouped_linear_dx(dy, weight, ends),
                cpu_gemm.grouped_dense(x, dense, None, ends),
                cpu_gemm.grouped_dense_dx(dy[:, :90], dense, ends),
            )
        )
    torch.set_num_threads(before)
    for others in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], others, strict=True))


@built
@pytest.mark.usefixtures("isa")
def test_weights_are_read_from_a_map_at_any_address_up_to_its_last_byte(tmp_path: Path):
    weight, x = random_weight(2, 32, 96), torch.randn(20, 96, dtype=torch.bfloat16)
    dy, ends = torch.randn(20, 32, dtype=torch.bfloat16), [3, 20]
    expected = cpu_gemm.grouped_linear(x, weight, None, ends), cpu_gemm.grouped_linear_dx(dy, weight, ends)
    for gap in (1, 7, 15):
        for last in (0, 1):
            # One tensor begins at an odd address, the other ends with the map, after which a read may be a fault.
            parts = [tensor.numpy().tobytes() for tensor in (weight[1 - last], weight[last])]
            size = -(-(len(parts[0]) + len(parts[1]) + gap) // 4096) * 4096
            starts = [size - len(parts[1]) - gap - len(parts[0]), size - len(parts[1])]
            path = tmp_path / f"weights{gap}{last}"
            path.write_bytes(bytes(starts[0]) + parts[0] + bytes(gap) + parts[1])
            mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
            views = [mapped[start : start + len(part)] for start, part in zip(starts, parts, strict=True)]
            blocks, scales = views if last == 1 else views[::-1]
            unaligned = MXFP4Weight(blocks.view_as(weight.blocks_EOGB), scales.view_as(weight.scales_EOG))
            assert torch.equal(cpu_gemm.grouped_linear(x, unaligned, None, ends), expected[0])
            assert torch.equal(cpu_gemm.grouped_linear_dx(dy, unaligned, ends), expected[1])


@built
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(32, 96), (33, 43)], ids=str)
@pytest.mark.usefixtures("isa")
def test_dense_weights_are_read_from_a_map_up_to_its_last_byte(shape, dtype, tmp_path: Path):
    (O, I), ends = shape, [3, 20]
    weight = random_dense(2, O, I, dtype)
    x, dy = torch.randn(20, I, dtype=torch.bfloat16), torch.randn(20, O, dtype=torch.bfloat16)
    expected = cpu_gemm.grouped_dense(x, weight, None, ends), cpu_gemm.grouped_dense_dx(dy, weight, ends)
    start = -weight.nbytes % 4096
    path = tmp_path / "weights"
    path.write_bytes(bytes(start) + weight.contiguous().view(torch.uint8).numpy().tobytes())
    mapped = torch.from_file(str(path), shared=False, size=start + weight.nbytes, dtype=torch.uint8)[start:]
    last = mapped.view(dtype).view(2, O, I)
    assert torch.equal(cpu_gemm.grouped_dense(x, last, None, ends), expected[0])
    assert torch.equal(cpu_gemm.grouped_dense_dx(dy, last, ends), expected[1])


@built
def test_mistakes_are_errors_and_never_reach_the_library():
    weight, x = random_weight(2, 64, 32), torch.randn(5, 32)
    with pytest.raises(ValueError, match=r"rows \(5, 32\) of torch.float32 must be \[T, 64\]"):
        cpu_gemm.grouped_linear_dx(x, weight, [2, 5])
    for ends in ([2, 6], [2, 4], [5], [6, 5], [-1, 5]):
        with pytest.raises(ValueError, match="rise to 5"):
            cpu_gemm.grouped_linear(x, weight, None, ends)
    with pytest.raises(ValueError, match=r"bias \(2, 32\) must be \(2, 64\)"):
        cpu_gemm.grouped_linear(x, weight, torch.zeros(2, 32), [2, 5])
    with pytest.raises(ValueError, match=r"are not \[E, O, G, 16\]"):
        cpu_gemm.grouped_linear(x, MXFP4Weight(weight.blocks_EOGB, weight.scales_EOG[:1]), None, [2, 5])
    with pytest.raises(ValueError, match="48 output features"):
        cpu_gemm.grouped_linear(x, random_weight(2, 48, 32), None, [2, 5])
    with pytest.raises(ValueError, match=r"rows \(5, 32\) of torch.float64"):
        cpu_gemm.linear(x.double(), torch.randn(8, 32), None)
    for refused in (torch.randn(32, 8).T, torch.randn(8, 32).double(), torch.randn(0, 32)):
        with pytest.raises(ValueError, match=r"must be \[E, O, I\], contiguous"):
            cpu_gemm.linear(x, refused, None)
