"""Merging low-rank updates into frozen weights, in plain torch: the bytes that a merged checkpoint holds.

Training through a merge and exporting it must agree to the last bit, whatever the device, the instruction set and the
number of threads. So the arithmetic is fixed: the update is summed over the ranks in ascending order, each product and
each sum rounded to fp32 by itself (no fused multiply-add), and added to the base last.

R LoRA rank · E experts · O out rows · I in columns (32·G) · G blocks of a row · B bytes of a block (16)
V elements of a block (32)
"""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from gptoss_ft.kernels.codec import SIGN_BIT, even_scales, pack_nibbles, quantize_mxfp4, unpack_nibbles
from gptoss_ft.kernels.reference import BLOCK_SIZE, SCALE_NAN, MXFP4Weight, dequantize_mxfp4

# Rows whose fp32 temporaries exist at once: 3 MB each at 2,880 columns.
TILE_ROWS = 256
GOLDEN_RATIO, UINT32 = 0x9E3779B9, 0xFFFFFFFF

# What `merge_mxfp4_dithered` writes, for those who keep it: raise the number when a bit of any result changes.
DITHER_RULE = "dithered 1"


# Rounds fp32 numbers [O, I] near a base: its blocks and scales, and the results.
Round = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def merge_mxfp4(
    weight: MXFP4Weight,
    A_ERI: Tensor,
    B_EOR: Tensor,
    scaling: float,
    ends_E: Sequence[int] | None = None,
    experts: Collection[int] | None = None,
) -> MXFP4Weight:
    """`weight + scaling · B[e] @ A[e]` in MXFP4, rounded as `round_near` does.

    Args:
        ends_E: where the rows of each expert end; those without rows are left out and hold anything. None: all are in.
        experts: those that have an update, the others keep their bytes; None means all.
    """
    return _merge(round_near, weight, A_ERI, B_EOR, scaling, ends_E, experts)


def merge_mxfp4_dithered(
    weight: MXFP4Weight,
    A_ERI: Tensor,
    B_EOR: Tensor,
    scaling: float,
    ends_E: Sequence[int] | None = None,
    experts: Collection[int] | None = None,
) -> MXFP4Weight:
    """`merge_mxfp4` by `round_dithered`."""
    return _merge(round_dithered, weight, A_ERI, B_EOR, scaling, ends_E, experts)


def _merge(
    round_rows: Round,
    weight: MXFP4Weight,
    A_ERI: Tensor,
    B_EOR: Tensor,
    scaling: float,
    ends_E: Sequence[int] | None,
    experts: Collection[int] | None,
) -> MXFP4Weight:
    blocks_EOGB, scales_EOG = (torch.empty_like(part, memory_format=torch.contiguous_format) for part in weight)
    for expert in experts_with_rows(len(blocks_EOGB), ends_E):
        blocks_OGB, scales_OG = weight.blocks_EOGB[expert], weight.scales_EOG[expert]
        if experts is not None and expert not in experts:
            blocks_EOGB[expert], scales_EOG[expert] = blocks_OGB, scales_OG
            continue
        for start in range(0, len(blocks_OGB), TILE_ROWS):
            rows = slice(start, start + TILE_ROWS)
            base_OI = dequantize_mxfp4(blocks_OGB[rows], scales_OG[rows], torch.float32)
            target_OI = base_OI + low_rank_update(A_ERI[expert], B_EOR[expert, rows], scaling)
            merged = round_rows(target_OI, blocks_OGB[rows], scales_OG[rows])
            blocks_EOGB[expert, rows], scales_EOG[expert, rows] = merged
    return MXFP4Weight(blocks_EOGB, scales_EOG)


def merge_bf16(weight_OI: Tensor, A_RI: Tensor, B_OR: Tensor, scaling: float) -> Tensor:
    """The bf16 numbers nearest to `weight + scaling · B @ A`, in the dtype of the weight: `[O, I]`."""
    merged_OI = torch.empty_like(weight_OI, memory_format=torch.contiguous_format)
    for start in range(0, len(weight_OI), TILE_ROWS):
        rows = slice(start, start + TILE_ROWS)
        merged_OI[rows] = (weight_OI[rows].float() + low_rank_update(A_RI, B_OR[rows], scaling)).bfloat16()
    return merged_OI


def low_rank_update(A_RI: Tensor, B_OR: Tensor, scaling: float) -> Tensor:
    """`scaling · B @ A` in fp32, by the arithmetic of this file: `[O, I]`."""
    A_RI, B_OR = A_RI.float(), B_OR.float() * scaling
    update_OI = B_OR[:, :1] * A_RI[0]
    for rank in range(1, len(A_RI)):
        # Two operations, for addmm and addcmul may fuse them.
        update_OI += B_OR[:, rank : rank + 1] * A_RI[rank]
    return update_OI


def round_near(target_OI: Tensor, base_blocks_OGB: Tensor, base_scales_OG: Tensor) -> tuple[Tensor, Tensor]:
    """Round fp32 numbers `[O, I]` to MXFP4, with the base's scales unless "even" ones lower a block's squared error.

    The common scale rules step exactly where numbers of the grid lie, so a nudge of a block's largest element can
    double its step and cost far more than the update. A zero that stays zero keeps the sign it has in the base, so that
    a block that does not change keeps its bytes. A block with a number that is not finite keeps its codes and becomes
    NaN by its scale.

    Returns:
        Blocks `[O, G, 16]` and scales `[O, G]`.
    """
    blocks, _ = quantize_mxfp4(target_OI, base_scales_OG)
    scales = base_scales_OG.clone()
    # Only blocks whose scale would differ are worth a second rounding: few, or none, of a base that "even" rounded.
    even = even_scales(target_OI)
    not_finite = even == SCALE_NAN
    candidates = (even != base_scales_OG) & ~not_finite
    wanted_NV = target_OI.unflatten(-1, (-1, BLOCK_SIZE))[candidates]
    even_blocks, even_scale = quantize_mxfp4(wanted_NV, even[candidates].unsqueeze(-1))
    kept_sq = _squared_error(blocks[candidates].unsqueeze(-2), scales[candidates].unsqueeze(-1), wanted_NV)
    better = _squared_error(even_blocks, even_scale, wanted_NV) < kept_sq
    rescaled = candidates.masked_scatter(candidates, better)
    blocks[rescaled] = even_blocks[better].squeeze(-2)
    scales[rescaled] = even[rescaled]
    scales[not_finite] = SCALE_NAN
    return _keep_codes(blocks, scales, base_blocks_OGB), scales


def round_dithered(target_OI: Tensor, base_blocks_OGB: Tensor, base_scales_OG: Tensor) -> tuple[Tensor, Tensor]:
    """`round_near`, but between two numbers of the grid each element has a threshold of its own, see `dither_of`.

    To nearest, an update below half a step changes nothing wherever it is. Here an element changes if its update
    exceeds its share of a step, which differs from element to element and never between calls: in the mean over many
    the update is kept, and none changes nothing. What exceeds the largest number of a block's scale is cut off all the
    same.
    """
    _, scales = round_near(target_OI, base_blocks_OGB, base_scales_OG)
    blocks, _ = quantize_mxfp4(target_OI, scales, dither_of(base_blocks_OGB))
    return _keep_codes(blocks, scales, base_blocks_OGB), scales


def dither_of(blocks_OGB: Tensor) -> Tensor:
    """Multiples of 2^-16 in [0, 1) for each element of a base, `[O, G, 32]`, spread evenly over the interval.

    They start somewhere in it by a hash of the block's bytes, and advance by the golden ratio from element to element.
    So rows, experts and layers may be rounded in any portions, and nothing has to be stored or drawn.
    """
    shifts = torch.arange(0, 32, 8, device=blocks_OGB.device)
    words = (blocks_OGB.long().unflatten(-1, (-1, 4)) << shifts).sum(-1)
    start = torch.zeros_like(words[..., 0])
    for word in words.unbind(-1):
        start = (start ^ word) * GOLDEN_RATIO & UINT32
        start ^= start >> 15
    places = torch.arange(BLOCK_SIZE, device=blocks_OGB.device) * GOLDEN_RATIO
    return ((start.unsqueeze(-1) + places & UINT32) >> 16).float() * 2**-16


def experts_with_rows(num_experts: int, ends_E: Sequence[int] | None) -> list[int]:
    """The numbers of the experts that have rows, or of all."""
    if ends_E is None:
        return list(range(num_experts))
    return [expert for expert in range(num_experts) if ends_E[expert] > (ends_E[expert - 1] if expert else 0)]


def _squared_error(blocks: Tensor, scales: Tensor, wanted_NV: Tensor) -> Tensor:
    """Of each block, `[N]` in fp64, added up in a fixed order: what it decides is to be the same everywhere."""
    square = (dequantize_mxfp4(blocks, scales, torch.float32) - wanted_NV).double().square()
    square = square[:, 0::2] + square[:, 1::2]
    while square.shape[1] > 1:
        low, high = square.chunk(2, dim=1)
        square = low + high
    return square[:, 0]


def _keep_codes(blocks: Tensor, scales: Tensor, base_blocks: Tensor) -> Tensor:
    """Blocks with the base's codes where zeros stay zeros, and in blocks that are NaN by their scale."""
    codes, base_codes = unpack_nibbles(blocks), unpack_nibbles(base_blocks)
    both_zero = ((codes | base_codes) & (SIGN_BIT - 1)) == 0
    kept = both_zero | (scales == SCALE_NAN).unsqueeze(-1)
    return pack_nibbles(torch.where(kept, base_codes, codes))
