"""gpt-oss's attention on NVIDIA GPUs, through torch's flex_attention, with memory linear in the length.

B sequences · H query heads · K key/value heads · T queries · S keys (as many) · D head dimension
"""

from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import mark_static
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, and_masks, create_block_mask, flex_attention
from torch.utils.weak import WeakIdKeyDictionary, WeakIdRef

from gptoss_ft.kernels.gpu import device
from gptoss_ft.kernels.reference import Tree

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def unavailable(where: torch.device, dtype: torch.dtype) -> str:
    """Why `sink_attention` cannot run there on tensors of `dtype`; empty if it can."""
    return device.unavailable(where, dtype, DTYPES)


def refusal(q_BHTD: Tensor, k_BKSD: Tensor, *_: object, **__: object) -> str:
    """Why flex_attention cannot attend with these tensors; empty if it can."""
    T, D, S = *q_BHTD.shape[-2:], k_BKSD.shape[-2]
    if T != S:
        return f"{T} queries of {S} keys are generation with a cache, and this attention is for training"
    if D < 16:
        return f"head dimension {D} is under 16, the least that tensor cores multiply"
    return ""


def sink_attention(
    q_BHTD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    sinks_H: Tensor,
    *,
    scaling: float,
    window: int | None,
    documents_BS: Tensor | None,
    tree: Tree | None = None,
) -> Tensor:
    """gpt-oss's causal attention, differentiable in its first four arguments: `[B, H, T, D]`.

    A query sees its own position and those before it, `window` in all (None: no limit), which have its number in
    `documents_BS` (None: one document). One of a negative number, as that of padding, sees nothing; its output is zero.
    The sink is a logit of each query head that takes part in the softmax and has no value. Where documents are trees, a
    branch does not see its neighbours, and `window` counts levels.

    The first call for a new kind of mask or shape compiles. Masks are kept: those of documents and trees as long as
    these very tensors, so give every layer of a step the same ones, and none that were made in inference mode.
    """
    if tree is None and documents_BS is None:
        mask = _causal_mask(q_BHTD.shape[-2], window, q_BHTD.device)
    else:
        mask = _documents_mask(documents_BS, tree, window)
    # What differs between two calls becomes a symbol in the code of later ones. Lengths may; but torch's kernel needs
    # the ratio of the numbers of heads as a constant, and the self-check or another model may have had others.
    for states in (q_BHTD, k_BKSD, v_BKSD):
        mark_static(states, [1, 3])
    mark_static(sinks_H, 0)
    return _compiled(_attend)(q_BHTD, k_BKSD, v_BKSD, sinks_H, mask, scaling)


def _attend(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, sinks_H: Tensor, mask: BlockMask, scaling: float) -> Tensor:
    out_BHTD, aux = flex_attention(
        q_BHTD,
        k_BKSD,
        v_BKSD,
        block_mask=mask,
        scale=scaling,
        enable_gqa=True,
        return_aux=AuxRequest(lse=True),
        # Left to choose, torch may take a backend whose log-sum-exp has another base and no gradient.
        kernel_options={"BACKEND": "TRITON"},
    )
    # What is left of the softmax beside the sink. flex_attention's backward takes the gradient of lse, so autograd does
    # the rest. (A sigmoid would be the same number, but lose six times as much of the gradient of a small sink.)
    lse_BHT = aux.lse
    assert lse_BHT is not None
    with_sink_BHT = torch.logaddexp(lse_BHT, sinks_H.to(lse_BHT.dtype)[:, None])
    share_BHT = torch.exp(lse_BHT - with_sink_BHT)
    return (out_BHTD * share_BHT[..., None]).to(q_BHTD.dtype)


@lru_cache(maxsize=16)
def _causal_mask(length: int, window: int | None, where: torch.device) -> BlockMask:
    return _build_mask(_sees(window), (1, length), where)


# By the first tensor that says what documents see, held weakly: all such tensors with their versions when masks were
# built, and these by window.
_masks_of_documents: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _documents_mask(documents_BS: Tensor | None, tree: Tree | None, window: int | None) -> BlockMask:
    given = (documents_BS, *(tree or (None, None)))
    tensors = [tensor for tensor in given if tensor is not None]
    if any(tensor.is_inference() for tensor in tensors):
        # These have no version: they may have been written to since.
        return _build_documents_mask(documents_BS, tree, window)
    versions = tuple(None if tensor is None else (WeakIdRef(tensor), tensor._version) for tensor in given)
    known, masks = _masks_of_documents.get(tensors[0], (None, {}))
    if known != versions:
        masks = {}
        _masks_of_documents[tensors[0]] = versions, masks
    if window not in masks:
        masks[window] = _build_documents_mask(documents_BS, tree, window)
    return masks[window]


def _build_documents_mask(documents_BS: Tensor | None, tree: Tree | None, window: int | None) -> BlockMask:
    # A mask that held the tensors themselves would keep them from ever being dropped.
    conditions = [_sees(window)] if tree is None else _on_branch(tree, window)
    if documents_BS is not None:
        conditions.append(_same_document(documents_BS.detach()))
    places_BS = documents_BS if tree is None else tree.depths_BS
    assert places_BS is not None
    return _build_mask(and_masks(*conditions), places_BS.shape, places_BS.device)


def _on_branch(tree: Tree, window: int | None) -> list[MaskMod]:
    depths_BS, until_BS = tree.depths_BS.detach(), tree.visible_until_BS.detach()

    def on_branch(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < until_BS[b, key])

    if window is None:
        return [on_branch]
    # As in `_sees`.
    constant = str(window)

    def near(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return depths_BS[b, query] - depths_BS[b, key] < int(constant)

    return [on_branch, near]


def _sees(window: int | None) -> MaskMod:
    # As text it stays a constant: a second int in its place, such as the self-check's, would become a symbol.
    constant = str(window)

    def causal(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key <= query

    if window is None:
        return causal

    def sliding(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key > query - int(constant))

    return sliding


def _same_document(documents_BS: Tensor) -> MaskMod:
    def same(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = documents_BS[b, query]
        return (own == documents_BS[b, key]) & (own >= 0)

    return same


def _build_mask(sees: MaskMod, shape_BS: Sequence[int], where: torch.device) -> BlockMask:
    num_sequences, length = shape_BS
    # Autograd, which may use it later, keeps no tensor made in inference mode.
    with torch.inference_mode(False):
        return _compiled(create_block_mask)(sees, num_sequences, None, length, length, device=where)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # Uncompiled, both functions hold length × length numbers; compiled, the share costs no further copy of the output.
    # Masks, lengths known and not, and their remainders of a block multiply to more variants than torch's limit of 8,
    # a keyword that the overloads of torch.compile lack.
    return torch.compile(function, fullgraph=True, recompile_limit=64)  # type: ignore[call-overload]
