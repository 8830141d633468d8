"""Rounding an expert whose inputs in the merged model are other than those in the trained one."""

import pytest
import torch

from gptoss_ft.export.merged import PackedUpdate, row_workers
from gptoss_ft.export.paired import round_paired
from gptoss_ft.kernels.codec import quantize_mxfp4
from gptoss_ft.kernels.reference import dequantize_mxfp4
from gptoss_ft.mxfp4.calibrated import is_held_out

O, K, FRESH = 96, 128, 2000


@pytest.fixture
def case():
    """An update of 5 % of a weight, and a function that draws so many inputs of it in both models."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    blocks, scales = quantize_mxfp4(normal(O, K) * K**-0.5)
    mixing, shift = normal(K, K) * torch.arange(1, K + 1) ** -0.7, 0.05 * normal(K)
    apart = 0.1 * normal(K, 4) @ normal(4, K) / K
    left, right = 0.05 * normal(O, 4), normal(4, K) @ mixing / K
    update = PackedUpdate(blocks, scales, normal(O).bfloat16(), lambda rows: left[rows] @ right)

    def draw(num_inputs):
        trained_NK = normal(num_inputs, K) @ mixing.T + normal(1, 1)
        return trained_NK, trained_NK + trained_NK @ apart + shift

    return update, draw


def round_(update, trained_NK, merged_NK, left_NO=None, weights_N=None):
    with row_workers() as pool:
        return round_paired(trained_NK, merged_NK, update, pool, 1, left_NO, weights_N)


def wrong_sq(update, rounded, trained_NK, merged_NK, left_NO=0):
    """Of the outputs of each row, squared, by dense arithmetic in fp64."""
    base_OK = dequantize_mxfp4(update.blocks, update.scales, torch.float64)
    target_OK = base_OK + update.of_rows(slice(None)).double()
    written_OK = dequantize_mxfp4(rounded.blocks, rounded.scales, torch.float64)
    wanted_NO = trained_NK.double() @ target_OK.T + update.bias.double() + left_NO
    return (wanted_NO - merged_NK.double() @ written_OK.T - rounded.bias.double()).square().sum(0)


# More and fewer inputs than columns: the two forms of the regression.
@pytest.mark.parametrize("num_inputs", [1024, 100])
def test_what_layers_before_left_is_made_good(case, num_inputs):
    update, draw = case
    trained_NK, merged_NK = draw(num_inputs)
    paired, alone = (round_(update, x, merged_NK) for x in (trained_NK, merged_NK))
    fresh = draw(FRESH)
    lost = [float(wrong_sq(update, rounded, *fresh).sum()) for rounded in (paired, alone)]
    assert lost[0] < 0.5 * lost[1]
    assert not torch.equal(paired.bias, update.bias)


@pytest.mark.parametrize("num_inputs", [1024, 100])
def test_what_is_left_beside_is_made_good_as_far_as_inputs_tell(case, num_inputs):
    update, draw = case
    generator = torch.Generator().manual_seed(2)
    told, shift = 0.1 * torch.randn(K, O, generator=generator) * K**-0.5, 0.1 * torch.randn(O, generator=generator)

    def with_left(trained_NK, merged_NK):
        noise = 0.01 * torch.randn(len(merged_NK), O, generator=generator)
        return trained_NK, merged_NK, merged_NK @ told + shift + noise

    pairs, fresh = with_left(*draw(num_inputs)), with_left(*draw(FRESH))
    lost = [float(wrong_sq(update, round_(update, *seen), *fresh).sum()) for seen in (pairs, pairs[:2])]
    assert lost[0] < 0.5 * lost[1]


@pytest.mark.parametrize("num_inputs", [1024, 100])
def test_inputs_count_by_their_weight(case, num_inputs):
    update, draw = case
    generator = torch.Generator().manual_seed(2)
    told = 0.1 * torch.randn(K, O, generator=generator) * K**-0.5

    def drawn(count):
        """Of the second half the opposite is left."""
        trained_NK, merged_NK = draw(count)
        left_NO = merged_NK @ told + 0.1
        left_NO[count // 2 :] *= -1
        # What judges is every so manieth.
        order = torch.randperm(count, generator=generator)
        return [part[order] for part in (trained_NK, merged_NK, left_NO)], (order < count // 2).float()

    pairs, is_first = drawn(num_inputs)
    alike, same, apart = (round_(update, *pairs, weights) for weights in (None, is_first * 0 + 4, is_first + 0.01))
    assert all(torch.equal(a, b) for a, b in zip(alike[:3], same[:3], strict=True))
    (fresh, fresh_is_first) = drawn(2 * FRESH)
    lost = {}
    for half in (0, 1):
        rows = [part[fresh_is_first != half] for part in fresh]
        lost[half] = [float(wrong_sq(update, rounded, *rows).sum()) for rounded in (apart, alike)]
    assert lost[0][0] < 0.7 * lost[0][1] and lost[1][0] > lost[1][1]


@pytest.mark.parametrize("num_inputs", [1024, 100])
def test_no_row_is_worse_than_the_base_on_what_is_held_out(case, num_inputs):
    update, draw = case
    trained_NK, merged_NK = draw(num_inputs)
    # Nothing can be told of this difference.
    merged_NK = merged_NK + torch.randn(merged_NK.shape, generator=torch.Generator().manual_seed(1))
    rounded = round_(update, trained_NK, merged_NK)
    held_out = is_held_out(num_inputs)
    pair = trained_NK[held_out], merged_NK[held_out]
    found, before = (wrong_sq(update, weight, *pair) for weight in (rounded, update))
    assert bool((found <= before * (1 + 1e-5)).all())
    assert rounded.stats.output_error_sq == pytest.approx(float(found.sum()), rel=1e-4)
    assert rounded.stats.output_sq == pytest.approx(float(before.sum()), rel=1e-4)
    base_rows = (found > before * (1 - 1e-7)).nonzero()[:, 0]
    for written, base in zip(rounded[:3], (update.blocks, update.scales, update.bias), strict=True):
        assert torch.equal(written[base_rows], base[base_rows])
