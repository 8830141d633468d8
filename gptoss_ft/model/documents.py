"""Attention masks that keep the documents of a packed row apart.

transformers 5.23 builds gpt-oss's masks without looking at `position_ids`: restarting positions turn the queries and
keys and leave every document in sight of those before it (logits wrong by 0.5 on a tiny model). A mask for each kind of
layer, given ready-made, is used as it is.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GptOssConfig
from transformers.masking_utils import create_causal_mask

from gptoss_ft.errors import UserError
from gptoss_ft.kernels.reference import Tree
from gptoss_ft.model.attention import ATTENTION, known_documents

# An attention that finds documents by itself, where positions restart, would cut branches off from what they grow from.
TAKE_ANY_MASK = ("eager", "flex_attention")
# The masks as transformers takes them in place of a mask of padding.
MasksByLayerType = dict[str, Any]


def document_masks(
    config: GptOssConfig,
    document_ids: Tensor,
    position_ids: Tensor,
    dtype: torch.dtype,
    *,
    visible_until: Tensor | None = None,
) -> MasksByLayerType:
    """Causal masks within each document, for full and for sliding layers, in the form of the config's attention.

    Args:
        document_ids: `[B, T]`, different for different documents of a row; padding is a document too.
        position_ids: `[B, T]`, from 0 in each document.
        dtype: of the hidden states.
        visible_until: `[B, T]`, the first place in the row from which a token is out of sight, if documents are trees
            in depth-first order: a branch does not see its neighbours. A window is measured in positions.

    Raises:
        UserError: for trees under an attention that would take them for documents one after the other.
    """
    if config._attn_implementation == ATTENTION:
        tree = None if visible_until is None else Tree(position_ids, visible_until)
        mask_of_all = known_documents(document_ids, tree)
        return {"full_attention": mask_of_all, "sliding_attention": mask_of_all}
    if visible_until is not None and config._attn_implementation not in TAKE_ANY_MASK:
        raise UserError(
            f"model.attn_implementation={config._attn_implementation} cannot tell the branches of a tree apart: "
            f"use {ATTENTION} or eager, or set data.share_prefixes=false"
        )

    def same_document(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = document_ids[row, query] == document_ids[row, key]
        return same if visible_until is None else same & (query < visible_until[row, key])

    def in_window(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        near = position_ids[row, query] - position_ids[row, key] < config.sliding_window
        return near & same_document(row, head, query, key)

    # Only its shape, dtype and device are asked for.
    hidden = torch.empty(*document_ids.shape, 0, dtype=dtype, device=document_ids.device)

    def mask(allowed: Callable[..., Tensor]) -> Any:
        return create_causal_mask(config, hidden, None, None, and_mask_function=allowed)

    return {"full_attention": mask(same_document), "sliding_attention": mask(in_window)}
