"""`attn_implementation="gptoss_ft"` of transformers: sink attention whose memory is linear in the length.

transformers asks a mask function for a mask once per forward pass and hands it to the attention function of every
layer. Ours makes no `[T, S]` mask but numbers the documents of keys, `[B, S]`. Packed documents are found where
`position_ids` start again, which transformers itself does not look at for gpt-oss and so lets them see each other.

B batch · T queries · S keys · H query heads · K key/value heads · D head dimension
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from gptoss_ft.errors import UserError
from gptoss_ft.kernels.dispatch import sink_attention
from gptoss_ft.kernels.reference import Tree

# transformers treats names that contain that of one of its own implementations as that one.
ATTENTION = "gptoss_ft"
PADDING = -1


def key_documents(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    attention_mask: Tensor | None,
    device: torch.device,
    **_: Any,
) -> Tensor | None:
    """0 for every key up to the last query's and -1 for padding, int32 `[B, S]`; None if all keys are 0.

    Takes what transformers gives to every mask function. Causality and the window are the attention's own affair. A
    cache of fixed size has room behind the last query's key, which is left out of S.
    """
    S = int(q_offset) + q_length - kv_offset
    if attention_mask is None:
        return None if kv_length == S else torch.zeros(batch_size, S, dtype=torch.int32, device=device)
    real_BS = attention_mask[:, kv_offset : kv_offset + S].bool()
    return None if kv_length == S and real_BS.all() else torch.where(real_BS, 0, PADDING).int()


def tree_mask(document_ids: Tensor, depths: Tensor, visible_until: Tensor) -> Tensor:
    """What `attention_forward` takes for a mask where documents are trees in depth-first order, int32 `[3, B, T]`.

    Args:
        document_ids: `[B, T]`, negative for padding.
        depths: `[B, T]`, from 0 in each tree.
        visible_until: `[B, T]`, the first place in the row behind all that grows from a token.
    """
    return torch.stack((document_ids, depths, visible_until)).int()


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    s_aux: Tensor,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    position_ids: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: the output `[B, T, H, D]`, and no attention weights.

    Args:
        query: `[B, H, T, D]`; key and value `[B, K, S, D]` with the queries' own keys last but for unused room.
        attention_mask: what `key_documents` or `tree_mask` returned.
        s_aux: the sinks, `[H]`.
        position_ids: `[B, T]` or `[1, T]`; a document begins where it does not rise.

    Raises:
        UserError: for a 4-D mask, dropout, or several documents in a row together with a cache.
    """
    if attention_mask is not None and attention_mask.ndim == 3:
        trees_BS, *places = attention_mask.unbind()
        out_BHTD = sink_attention(
            query, key, value, s_aux, scaling=scaling, window=sliding_window, documents_BS=trees_BS, tree=Tree(*places)
        )
        return out_BHTD.transpose(1, 2).contiguous(), None
    if attention_mask is not None and attention_mask.ndim != 2:
        raise UserError(
            f"{ATTENTION} attention takes no mask of shape {tuple(attention_mask.shape)}: pass padding as a 2-D "
            "attention_mask and packed documents as position_ids, or set model.attn_implementation=eager"
        )
    if dropout:
        raise UserError(f"{ATTENTION} attention has no dropout: set attention_dropout to 0 in the model's config")
    if attention_mask is not None:
        key, value = (states[:, :, : attention_mask.shape[1]] for states in (key, value))
    documents_BS = _documents(position_ids, attention_mask, query.shape[0], query.shape[2], key.shape[2])
    out_BHTD = sink_attention(
        query, key, value, s_aux, scaling=scaling, window=sliding_window, documents_BS=documents_BS
    )
    return out_BHTD.transpose(1, 2).contiguous(), None


def _documents(positions_BT: Tensor | None, padding_BS: Tensor | None, B: int, T: int, S: int) -> Tensor | None:
    """The document of every key, int32 `[B, S]`, from where positions restart and from -1 for padding."""
    if positions_BT is None or T == 1:
        return padding_BS
    positions_BT = positions_BT.expand(B, T)
    real_BT = torch.ones_like(positions_BT, dtype=torch.bool) if padding_BS is None else padding_BS[:, S - T :] >= 0
    # Padding may have any positions: a token is compared with the last one before it that is none.
    index_T = torch.arange(T, device=positions_BT.device)
    last_real_BT = torch.where(real_BT, index_T, -1).cummax(-1).values
    before_BT = last_real_BT.roll(1, -1)
    before_BT[:, 0] = -1
    starts_BT = real_BT & (before_BT >= 0) & (positions_BT <= positions_BT.gather(-1, before_BT.clamp(min=0)))
    if not starts_BT.any():
        return padding_BS
    if T != S:
        raise UserError(
            "position_ids restart in a row that continues a cache, where the documents of earlier keys are not known: "
            "pass packed documents with use_cache=False"
        )
    return starts_BT.cumsum(-1).masked_fill(~real_BT, PADDING).int()


AttentionInterface.register(ATTENTION, attention_forward)
AttentionMaskInterface.register(ATTENTION, key_documents)
