"""Rounding base + update: what must not move, and that every block is the better of its two candidates."""

import pytest
import torch

from gptoss_ft.kernels.codec import even_scales, quantize_mxfp4, unpack_nibbles
from gptoss_ft.kernels.reference import dequantize_mxfp4
from gptoss_ft.mxfp4.round import UpdateStats, measure_update, round_merged


def packed_base(rows=24, groups=6, seed=0):
    """Blocks of random codes, zeros of both signs among them, at scales that no rule relates to the codes."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (rows, groups, 16), dtype=torch.uint8, generator=generator)
    # Codes up to 3 only: such blocks invite every rule that looks at the maximum to pick a smaller scale.
    blocks[: rows // 3] &= 0xBB
    return blocks, torch.randint(118, 124, (rows, groups), dtype=torch.uint8, generator=generator)


def update(shape, relative_to, share, seed=1):
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return delta * (share * relative_to.norm() / delta.norm())


def test_no_update_keeps_every_byte():
    blocks, scales = packed_base()
    target = dequantize_mxfp4(blocks, scales, torch.float32)
    new_blocks, new_scales, stats = round_merged(target, blocks, scales)
    assert torch.equal(new_blocks, blocks) and torch.equal(new_scales, scales)
    assert stats.num_changed == 0 and stats.relative_error is None


def test_blocks_without_update_keep_their_bytes_beside_blocks_with_one():
    blocks, scales = packed_base()
    target = dequantize_mxfp4(blocks, scales, torch.float32)
    target[:, 32:64] += update((24, 32), target, 0.5)
    new_blocks, new_scales, stats = round_merged(target, blocks, scales)
    others = [0, 2, 3, 4, 5]
    assert torch.equal(new_blocks[:, others], blocks[:, others])
    assert torch.equal(new_scales[:, others], scales[:, others])
    assert stats.num_changed > 0


@pytest.mark.parametrize("share", [0.01, 0.2, 1.0])
def test_each_block_is_the_better_of_base_and_even_scale(share):
    blocks, scales = packed_base()
    base = dequantize_mxfp4(blocks, scales, torch.float32)
    target = base + update(base.shape, base, share)
    new_blocks, new_scales, stats = round_merged(target, blocks, scales)
    written = dequantize_mxfp4(new_blocks, new_scales, torch.float32)

    def errors(scale):
        values = dequantize_mxfp4(quantize_mxfp4(target, scale)[0], scale, torch.float32)
        return (values - target).double().square().unflatten(-1, (-1, 32)).sum(-1)

    kept, even = errors(scales), errors(even_scales(target))
    found = (written - target).double().square().unflatten(-1, (-1, 32)).sum(-1)
    assert torch.equal(found, torch.minimum(kept, even))
    assert torch.equal(new_scales, torch.where(even < kept, even_scales(target), scales))
    assert (new_scales != scales).any()
    assert stats == measure_update(base, target, written)


def test_a_zero_that_stays_zero_keeps_its_sign():
    blocks = torch.full((1, 1, 16), 0x08, dtype=torch.uint8)
    blocks[0, 0, 0] = 0x68  # one element of 4 sets the scale
    scales = torch.full((1, 1), 127, dtype=torch.uint8)
    target = dequantize_mxfp4(blocks, scales, torch.float32) + 0.1
    new_blocks, _, _ = round_merged(target, blocks, scales)
    assert torch.equal(unpack_nibbles(new_blocks), unpack_nibbles(blocks))


def test_statistics_add_up_and_mean_what_they_say():
    generator = torch.Generator().manual_seed(3)
    base, target, written = (torch.randn(6, 32, generator=generator) for _ in range(3))
    whole = measure_update(base, target, written)
    parts = [measure_update(base[rows], target[rows], written[rows]) for rows in (slice(0, 2), slice(2, 6))]
    assert sum(parts, UpdateStats()).retained == pytest.approx(whole.retained)
    delta, applied = (target - base).double(), (written - base).double()
    assert whole.relative_update == pytest.approx((delta.norm() / base.double().norm()).item())
    assert whole.relative_error == pytest.approx(((applied - delta).norm() / delta.norm()).item())
    assert whole.retained == pytest.approx(((applied * delta).sum() / delta.square().sum()).item())
    assert whole.changed_share == 1.0
