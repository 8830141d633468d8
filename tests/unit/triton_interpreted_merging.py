"""The Triton kernels that merge, in Triton's interpreter on the CPU: every byte is that of the definition.

`test_triton_kernels` runs this file in a process of its own: whether Triton interprets is settled when it is imported.
What only the compiler does, such as fusing products and sums, is looked for in its machine code there.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from gptoss_ft.kernels import merging as definition
from gptoss_ft.kernels.gpu import merging
from gptoss_ft.kernels.reference import MXFP4Weight

E, O, G = 3, 67, 3
ROUNDINGS = ("merge_mxfp4", "merge_mxfp4_dithered")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors hold NaN or the largest byte, so an element that no kernel writes shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    assert (torch.empty(8, dtype=torch.uint8) == 255).all()
    yield
    torch.use_deterministic_algorithms(False)


def packed(scales: tuple[int, int] = (112, 130)) -> MXFP4Weight:
    """Every code at scales that no rule relates to it; a third of the blocks invite a smaller scale."""
    blocks = torch.randint(0, 256, (E, O, G, 16), dtype=torch.uint8)
    blocks[:, : O // 3] &= 0xBB
    return MXFP4Weight(blocks, torch.randint(*scales, (E, O, G), dtype=torch.uint8))


def factors(size: float, rank: int = 5, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A, and B in PEFT's layout, whose fastest dimension is the expert; updates of about `size`."""
    A, B = torch.randn(E, rank, 32 * G), size * torch.randn(O, rank, E)
    return A.to(dtype), B.to(dtype).permute(2, 0, 1)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize(
    ("size", "rank", "dtype"),
    [(1e-4, 1, torch.float32), (1e-2, 5, torch.bfloat16), (1.0, 16, torch.float32), (1e4, 5, torch.float32)],
    ids=str,
)
def test_packed_weights(size, rank, dtype, rounding):
    weight, given = packed(), factors(size, rank, dtype)
    ours, theirs = (getattr(module, rounding)(weight, *given, 0.3) for module in (merging, definition))
    assert all(map(torch.equal, ours, theirs))
    assert not torch.equal(ours.blocks_EOGB, weight.blocks_EOGB)
    assert (ours.scales_EOG != weight.scales_EOG).float().mean() > 0.01


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_extreme_scales_and_numbers_that_are_not_finite(rounding):
    weight, (A, B) = packed((0, 256)), factors(1e-3)
    weight.scales_EOG[0, :9] = torch.tensor([0, 254, 255])
    A[1, 2, 40], B[2, 5, 0], B[2, 6] = torch.inf, torch.nan, 3e38
    ours, theirs = (getattr(module, rounding)(weight, A, B, 1.0) for module in (merging, definition))
    assert all(map(torch.equal, ours, theirs))
    assert (ours.scales_EOG[2, 5:7] == 255).all() and (ours.scales_EOG[1, :, 1] == 255).all()


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_experts_without_rows_are_left_out_and_those_without_an_update_keep_their_bytes(rounding):
    weight, given = packed(), factors(0.1)
    for ends, experts in (([4, 4, 9], None), ([4, 4, 9], {1, 2}), ([0, 3, 9], {0}), ([2, 3, 9], [])):
        ours, theirs = (
            getattr(module, rounding)(weight, *given, 0.3, ends, experts) for module in (merging, definition)
        )
        for expert in definition.experts_with_rows(E, ends):
            for mine, expected, base in zip(ours, theirs, weight, strict=True):
                assert torch.equal(mine[expert], expected[expert])
                assert torch.equal(mine[expert], base[expert]) == (experts is not None and expert not in experts)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_an_update_of_zero_changes_no_byte(rounding):
    weight, (A, B) = packed(), factors(1.0)
    # Scales that "even" would choose too: others may be exact as well, and are kept only then.
    weight.blocks_EOGB[..., 0] = 0x77
    merged = getattr(merging, rounding)(weight, A, torch.zeros_like(B), 0.3)
    assert all(map(torch.equal, merged, weight))


@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dense_weights(dtype, factor_dtype):
    weight = torch.randn(37, 301).to(dtype)
    A, B = torch.randn(5, 301).to(factor_dtype), (0.1 * torch.randn(37, 5)).to(factor_dtype)
    # Numbers half-way between two of bf16, and some that are not finite.
    weight[0], B[0] = (1 + torch.arange(301) / 256).to(dtype), 0
    A[0, 3], B[4, 0] = torch.inf, torch.nan
    ours, theirs = (module.merge_bf16(weight, A, B, 0.3) for module in (merging, definition))
    assert ours.dtype == dtype and not torch.equal(ours, weight)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
