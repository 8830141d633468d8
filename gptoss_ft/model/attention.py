"""`attn_implementation="gptoss_ft"` of transformers: sink attention whose memory is linear in the length.

transformers asks a mask function for a mask once per forward pass and kind of layer, and hands it to the attention
function of each such layer. Ours makes no `[T, S]` mask but numbers the documents of keys, `[B, S]`. Packed documents
are found where `position_ids` start again, which transformers itself does not look at for gpt-oss and so lets them see
each other. Mask functions are not given `position_ids` either: the first layer finds the documents, and leaves them in
the mask for the others.

B batch · T queries · S keys · H query heads · K key/value heads · D head dimension
"""

from typing import Any, NamedTuple

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


class Documents(NamedTuple):
    """Which document every key belongs to, int32 `[B, S]` (None: all to one), and the tree it is, if they are trees."""

    numbers_BS: Tensor | None
    tree: Tree | None = None

    def kept_on(self, device: torch.device) -> "Documents":
        """The same on a device, in tensors that tell whether they were written to, as those of inference mode do not.

        What attention derives from a tensor is kept only then.
        """

        def kept(tensor: Tensor) -> Tensor:
            moved = tensor.to(device)
            return moved.clone() if moved.is_inference() else moved

        with torch.inference_mode(False):
            numbers_BS = None if self.numbers_BS is None else kept(self.numbers_BS)
            return Documents(numbers_BS, self.tree and Tree(*map(kept, self.tree)))


class DocumentMask:
    """The mask of one forward pass, the same for every layer that it is given to.

    Each layer gets the very same tensors, so that what an attention derives from them is derived once.

    Args:
        num_keys: S; keys behind it are room of a cache that nothing is in yet.
        padding_BS: 0, and -1 for padding, int32 `[B, S]`; None if there is none.
        known: what needs not be found by padding and `position_ids`.
    """

    def __init__(self, num_keys: int, padding_BS: Tensor | None = None, known: Documents | None = None) -> None:
        self.num_keys, self._padding_BS, self._found = num_keys, padding_BS, known
        self._on_device: dict[torch.device, Documents] = {}

    def documents(self, positions_BT: Tensor | None, B: int, T: int, device: torch.device) -> Documents:
        """What the first call found, on a device.

        Args:
            positions_BT: `[B, T]` or `[1, T]`; a document begins where they do not rise.
        """
        if self._found is None:
            positions_BT = None if positions_BT is None else positions_BT.to(device)
            padding_BS = None if self._padding_BS is None else self._padding_BS.to(device)
            self._found = Documents(_documents(positions_BT, padding_BS, B, T, self.num_keys))
        if device not in self._on_device:
            self._on_device[device] = self._found.kept_on(device)
        return self._on_device[device]

    def contiguous(self) -> "DocumentMask":
        """Itself: transformers takes masks for tensors when it prepares generation with a cache of fixed size."""
        return self


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
) -> DocumentMask:
    """A mask that knows of padding and of how many keys there are up to the last query's.

    Takes what transformers gives to every mask function. Causality and the window are the attention's own affair. A
    cache of fixed size has room behind the last query's key, which is left out of S.
    """
    S = int(q_offset) + q_length - kv_offset
    if attention_mask is None:
        return DocumentMask(S)
    real_BS = attention_mask[:, kv_offset : kv_offset + S].bool()
    return DocumentMask(S, None if real_BS.all() else torch.where(real_BS, 0, PADDING).int())


def known_documents(document_ids: Tensor, tree: Tree | None = None) -> DocumentMask:
    """The mask of rows whose documents need not be found.

    Args:
        document_ids: `[B, T]`, negative for padding.
        tree: if documents are trees in depth-first order.
    """
    tree = tree and Tree(*(places_BT.int() for places_BT in tree))
    return DocumentMask(document_ids.shape[1], known=Documents(document_ids.int(), tree))


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: DocumentMask | None,
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
        attention_mask: what `key_documents` or `known_documents` returned; None if no key is padding or unused.
        s_aux: the sinks, `[H]`.
        position_ids: `[B, T]` or `[1, T]`; a document begins where it does not rise.

    Raises:
        UserError: for another mask, dropout, or several documents in a row together with a cache.
    """
    mask = DocumentMask(key.shape[2]) if attention_mask is None else attention_mask
    if not isinstance(mask, DocumentMask):
        raise UserError(
            f"{ATTENTION} attention takes no mask of shape {tuple(mask.shape)}: pass padding as a 2-D "
            "attention_mask and packed documents as position_ids, or set model.attn_implementation=eager"
        )
    if dropout:
        raise UserError(f"{ATTENTION} attention has no dropout: set attention_dropout to 0 in the model's config")
    documents_BS, tree = mask.documents(position_ids, query.shape[0], query.shape[2], query.device)
    key, value = (states[:, :, : mask.num_keys] for states in (key, value))
    out_BHTD = sink_attention(
        query, key, value, s_aux, scaling=scaling, window=sliding_window, documents_BS=documents_BS, tree=tree
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
