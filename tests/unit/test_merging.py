"""Merged bytes: the same for every instruction set and number of threads, and those of the rule in fp64."""

import hashlib

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


ROUNDINGS = ("merge_mxfp4", "merge_mxfp4_dithered")
both_roundings = pytest.mark.parametrize("rounding", ROUNDINGS)


@pytest.fixture(params=[merging, cpu_merging], ids=["reference", "library"])
def implementation(request):
    if request.param is cpu_merging and cpu_library.library() is None:
        pytest.skip("the CPU library was not built")
    return request.param


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@both_roundings
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0, 1e4])
def test_library_and_reference_write_the_same_bytes(size, dtype, rounding, isa):
    weight, (A, B) = packed(), factors(size, dtype)
    ours, reference = (getattr(module, rounding)(weight, A, B, 0.3) for module in (cpu_merging, merging))
    assert all(map(torch.equal, ours, reference))
    assert not torch.equal(ours.blocks_EOGB, weight.blocks_EOGB)
    rescaled = (ours.scales_EOG != weight.scales_EOG).float().mean()
    assert rescaled > 0.01


@both_roundings
def test_the_smallest_and_the_largest_scales(rounding, isa):
    weight, (A, B) = packed((0, 255)), factors(1e-3)
    ours, reference = (getattr(module, rounding)(weight, A, B, 1.0) for module in (cpu_merging, merging))
    assert all(map(torch.equal, ours, reference))


@both_roundings
def test_threads_change_no_bit(rounding, isa):
    weight, (A, B) = packed(), factors(0.1)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(getattr(cpu_merging, rounding)(weight, A, B, 1.0))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(part, first) for result in results for part, first in zip(result, results[0], strict=True))


@both_roundings
def test_without_an_update_every_byte_stays(rounding, implementation):
    # From 253 on, 6 times the scale is beyond fp32; 255 is NaN.
    weight, (A, B) = packed((0, 253)), factors(0.0)
    weight.scales_EOG[1, 2, 3] = 255
    assert all(map(torch.equal, getattr(implementation, rounding)(weight, A, B, 1.0), weight))


@both_roundings
def test_only_experts_with_rows_are_made_and_only_chosen_ones_are_updated(rounding, isa):
    weight, (A, B) = packed(), factors(0.1)
    every = getattr(merging, rounding)(weight, A, B, 1.0)
    for module in (merging, cpu_merging):
        ours = getattr(module, rounding)(weight, A, B, 1.0, ends_E=[4, 4, 9], experts={0, 1})
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


@both_roundings
def test_numbers_that_are_not_finite_make_their_blocks_nan(rounding, implementation):
    weight, (A, B) = packed(), factors(0.1)
    A[1, 2, 40], A[2, 0, 3] = torch.nan, torch.inf
    merged = dequantize_mxfp4(*getattr(implementation, rounding)(weight, A, B, 1.0), torch.float32)
    assert merged[1, :, 32:64].isnan().all() and merged[2, :, :32].isnan().all()
    assert merged[0].isfinite().all() and merged[1:, :, 64:].isfinite().all()


def test_dithered_numbers_are_neighbours_on_the_grid_by_the_threshold_of_each_element():
    weight, (A, B) = packed(), factors(0.02)
    merged = dispatch.merge_mxfp4_dithered(weight, A, B, 0.5)
    base, found = (dequantize_mxfp4(*packed, torch.float64) for packed in (weight, merged))
    target = base + 0.5 * B.double() @ A.double()
    unit = torch.exp2(merged.scales_EOG.double() - 127).repeat_interleave(32, -1)
    wanted = (target / unit).abs().clamp_max(6)
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    above = torch.searchsorted(grid, wanted).clamp_min(1)
    lower, upper = grid[above - 1], grid[above]
    threshold = 1 - merging.dither_of(weight.blocks_EOGB.flatten(0, 1)).view_as(base).double()
    share = (wanted - lower) / (upper - lower)
    clear = (share - threshold).abs() > 1e-4  # beside its threshold an element falls either way by rounding to fp32
    expected = torch.where(share >= threshold, upper, lower) * unit * target.sign()
    assert clear.float().mean() > 0.99
    assert torch.equal(found[clear], expected[clear])


@pytest.mark.parametrize("update", [0.01, 0.1, -0.02])
def test_dither_keeps_small_updates_in_the_mean(update):
    # From 0.5 to 4 in steps of 0.5 to 2, with a 4 in each block, which "even" scales by 1 too.
    rows, groups = 512, 8
    low, high = torch.randint(1, 7, (2, 1, rows, groups, 16), dtype=torch.uint8)
    blocks = low | high << 4
    blocks[..., 0] = 0x66
    weight = MXFP4Weight(blocks, torch.full((1, rows, groups), 127, dtype=torch.uint8))
    A, B = torch.ones(1, 1, 32 * groups), torch.full((1, rows, 1), update)
    base = dequantize_mxfp4(*weight, torch.float64)
    nearest = dequantize_mxfp4(*dispatch.merge_mxfp4(weight, A, B, 1.0), torch.float64)
    dithered = dequantize_mxfp4(*dispatch.merge_mxfp4_dithered(weight, A, B, 1.0), torch.float64)
    assert torch.equal(nearest, base)
    assert (dithered - base).mean().item() == pytest.approx(update, rel=0.1)


def test_dither_is_spread_evenly_and_follows_from_the_block_alone():
    dither = merging.dither_of(torch.randint(0, 256, (4096, 2, 16), dtype=torch.uint8))
    assert dither.min() >= 0 and dither.max() < 1
    shares = torch.histc(dither, 64, 0, 1) / dither.numel() * 64
    assert shares.min() > 0.95 and shares.max() < 1.05
    start = dither[..., 0]
    assert torch.corrcoef(torch.stack((start[:, 0], start[:, 1])))[0, 1].abs() < 0.06
    # Within one block: no gap between neighbours is far from 1/32.
    gaps = dither.sort(-1).values.diff(dim=-1)
    assert gaps.max() < 2 / 32 and gaps.min() > 0.4 / 32


def test_dithered_rows_do_not_depend_on_their_portion(isa):
    weight, (A, B) = packed(), factors(0.02)
    whole = dispatch.merge_mxfp4_dithered(weight, A, B, 1.0)
    rows = slice(13, 40)
    part = MXFP4Weight(*(tensor[1:2, rows].contiguous() for tensor in weight))
    merged = dispatch.merge_mxfp4_dithered(part, A[1:2], B[1:2, rows], 1.0)
    assert all(torch.equal(ours, theirs[1:2, rows]) for ours, theirs in zip(merged, whole, strict=True))


def test_what_the_rule_of_dithering_writes_has_not_changed():
    """Runs and exports record the rule by its name: whoever changes a bit of this gives it another one."""
    codes = torch.arange(2 * 6 * 3 * 16).view(2, 6, 3, 16)
    weight = MXFP4Weight((codes * 37 % 251).byte(), (120 + codes[..., 0] // 16 % 5).byte())
    A = torch.arange(2 * 4 * 96).view(2, 4, 96).mul(29).remainder(61).sub(30) / 64
    B = torch.arange(2 * 6 * 4).view(2, 6, 4).mul(17).remainder(31).sub(15) / 512
    digest = hashlib.sha256()
    for part in merging.merge_mxfp4_dithered(weight, A, B, 0.5):
        digest.update(part.contiguous().numpy().data)
    assert (merging.DITHER_RULE, digest.hexdigest()[:16]) == ("dithered 1", "3fc6b1a8c019fd6a")


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
