"""Merged bytes: the same for every instruction set and number of threads, and those of the rule in fp64."""

import pytest
import torch

from gptoss_ft.kernels import cpu_library, cpu_merging, dispatch, merging
from gptoss_ft.kernels.codec import even_scales, quantize_mxfp4
from gptoss_ft.kernels.reference import MXFP4Weight, dequantize_mxfp4
from gptoss_ft.mxfp4.round import round_merged

E, R = 3, 5
# Rows that fill no tile of 4 or run of 64, and blocks that fill no strip of 4.
O, G = 67, 5


def packed(scales=(112, 130)):
    """Every code at scales that no rule relates to it; a third of the blocks invite a smaller scale."""
    blocks = torch.randint(0, 256, (E, O, G, 16), dtype=torch.uint8)
    blocks[:, : O // 3] &= 0xBB
    return MXFP4Weight(blocks, torch.randint(*scales, (E, O, G), dtype=torch.uint8))


def factors(size, dtype=torch.float32):
    """A, and B in PEFT's layout, whose fastest dimension is the expert; updates of about `size`."""
    A = torch.randn(E, R, 32 * G)
    return A.to(dtype), (size * torch.randn(O, R, E)).to(dtype).permute(2, 0, 1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0, 1e4])
def test_library_and_reference_write_the_same_bytes(size, dtype, isa):
    weight, (A, B) = packed(), factors(size, dtype)
    ours, reference = cpu_merging.merge_mxfp4(weight, A, B, 0.3), merging.merge_mxfp4(weight, A, B, 0.3)
    assert all(map(torch.equal, ours, reference))
    assert not torch.equal(ours.blocks_EOGB, weight.blocks_EOGB)
    rescaled = (ours.scales_EOG != weight.scales_EOG).float().mean()
    assert rescaled > 0.01


def test_the_smallest_and_the_largest_scales(isa):
    weight, (A, B) = packed((0, 255)), factors(1e-3)
    ours, reference = cpu_merging.merge_mxfp4(weight, A, B, 1.0), merging.merge_mxfp4(weight, A, B, 1.0)
    assert all(map(torch.equal, ours, reference))


def test_threads_change_no_bit(isa):
    weight, (A, B) = packed(), factors(0.1)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(cpu_merging.merge_mxfp4(weight, A, B, 1.0))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(part, first) for result in results for part, first in zip(result, results[0], strict=True))


@pytest.mark.parametrize("merge", [merging.merge_mxfp4, cpu_merging.merge_mxfp4])
def test_without_an_update_every_byte_stays(merge):
    if merge is cpu_merging.merge_mxfp4 and cpu_library.library() is None:
        pytest.skip("the CPU library was not built")
    # From 253 on, 6 times the scale is beyond fp32; 255 is NaN.
    weight, (A, B) = packed((0, 253)), factors(0.0)
    weight.scales_EOG[1, 2, 3] = 255
    assert all(map(torch.equal, merge(weight, A, B, 1.0), weight))


def test_only_experts_with_rows_are_made_and_only_chosen_ones_are_updated(isa):
    weight, (A, B) = packed(), factors(0.1)
    every = merging.merge_mxfp4(weight, A, B, 1.0)
    for merge in (merging.merge_mxfp4, cpu_merging.merge_mxfp4):
        ours = merge(weight, A, B, 1.0, ends_E=[4, 4, 9], experts={0, 1})
        for part, base, updated in zip(ours, weight, every, strict=True):
            assert torch.equal(part[0], updated[0]) and torch.equal(part[2], base[2])


def test_each_block_is_the_better_rounding_of_the_sum_in_fp64():
    weight, (A, B) = packed(), factors(0.05)
    target = dequantize_mxfp4(*weight, torch.float64) + 0.5 * B.double() @ A.double()
    found = dequantize_mxfp4(*dispatch.merge_mxfp4(weight, A, B, 0.5), torch.float64)

    def errors(values):
        return (values - target).square().unflatten(-1, (-1, 32)).sum(-1)

    def rounded_with(scales):
        return dequantize_mxfp4(quantize_mxfp4(target, scales)[0], scales, torch.float64)

    best = torch.minimum(errors(rounded_with(weight.scales_EOG)), errors(rounded_with(even_scales(target))))
    # Elements beside a tie fall either way by the rounding of the sum to fp32.
    torch.testing.assert_close(errors(found), best, rtol=1e-4, atol=0)


@pytest.mark.parametrize("merge", [merging.merge_mxfp4, cpu_merging.merge_mxfp4])
def test_numbers_that_are_not_finite_make_their_blocks_nan(merge):
    if merge is cpu_merging.merge_mxfp4 and cpu_library.library() is None:
        pytest.skip("the CPU library was not built")
    weight, (A, B) = packed(), factors(0.1)
    A[1, 2, 40], A[2, 0, 3] = torch.nan, torch.inf
    merged = dequantize_mxfp4(*merge(weight, A, B, 1.0), torch.float32)
    assert merged[1, :, 32:64].isnan().all() and merged[2, :, :32].isnan().all()
    assert merged[0].isfinite().all() and merged[1:, :, 64:].isfinite().all()


def test_it_is_the_rounding_of_a_merge_with_statistics():
    weight, (A, B) = packed(), factors(0.1)
    blocks, scales = merging.merge_mxfp4(weight, A, B, 1.0)
    for expert in range(E):
        base = dequantize_mxfp4(weight.blocks_EOGB[expert], weight.scales_EOG[expert], torch.float32)
        target = base + merging.low_rank_update(A[expert], B[expert], 1.0)
        by_rule = round_merged(target, weight.blocks_EOGB[expert], weight.scales_EOG[expert])
        assert torch.equal(blocks[expert], by_rule[0]) and torch.equal(scales[expert], by_rule[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [3, 96, 101])
def test_dense_weights_are_rounded_to_bf16(columns, dtype, isa):
    weight = torch.randn(67, columns).bfloat16()
    A, B = torch.randn(R, columns), 0.01 * torch.randn(67, R)
    reference, ours = (make.merge_bf16(weight.to(dtype), A, B, 0.7) for make in (merging, cpu_merging))
    assert reference.dtype == ours.dtype == dtype and torch.equal(reference, ours)
    wanted = (weight.double() + 0.7 * B.double() @ A.double()).bfloat16()
    assert (ours.bfloat16() != wanted).float().mean() < 1e-3
    assert not torch.equal(ours.bfloat16(), weight)
