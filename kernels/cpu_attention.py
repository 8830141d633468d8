"""Sink attention in the compiled library, forward and backward, with memory linear in the length.

Deterministic: sums run in an order that no number of threads changes. fp32 tensors are computed in fp32; bf16 tensors
too, but for processors with AVX-512-BF16, where products take bf16 operands and everything else is fp32.

B batch · H query heads · K key/value heads · T queries · S keys · D head dimension
"""

import ctypes

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from gptoss_ft.kernels.cpu_library import DTYPES, INT, LONG, POINTER, check, common, current_isa, function, running_in
from gptoss_ft.kernels.reference import Tree

MAX_HEAD_DIM = 256


class View(ctypes.Structure):
    """Address and strides, in elements, of a tensor whose last dimension is contiguous."""

    _fields_ = (("data", POINTER), ("batch", LONG), ("head", LONG), ("token", LONG))

    @classmethod
    def of(cls, tensor: Tensor) -> "View":
        """Of a tensor `[batch, head, token, head_dim]`."""
        return cls(tensor.data_ptr(), *tensor.stride()[:3])


class _Attention(ctypes.Structure):
    """`struct Attention` of cpu/attention.h."""

    _fields_ = (
        *((size, LONG) for size in ("batch", "query_heads", "kv_heads", "queries", "keys", "head_dim", "window")),
        *((array, POINTER) for array in ("documents", "depths", "visible_until")),
        ("reach", LONG),
        *((array, POINTER) for array in ("sinks", "lse")),
        *((view, View) for view in ("q", "k", "v", "out", "d_out", "dk", "dv")),
        *((array, POINTER) for array in ("dq", "delta", "dsinks")),
        ("scaling", ctypes.c_float),
    )


def refusal(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, sinks_H: Tensor, *, scaling: float, **_: object) -> str:
    """Why the library cannot compute with these CPU tensors; empty if it can."""
    D = q_BHTD.shape[-1]
    if any(tensor.device.type != "cpu" for tensor in (q_BHTD, k_BKSD, v_BKSD, sinks_H)):
        return "operands are on different devices"
    if not (q_BHTD.dtype == k_BKSD.dtype == v_BKSD.dtype in DTYPES):
        return f"the CPU library attends in bf16 and fp32, not {q_BHTD.dtype}, {k_BKSD.dtype} and {v_BKSD.dtype}"
    if D % 8 or D > MAX_HEAD_DIM:
        return f"head dimension {D} is no multiple of 8 up to {MAX_HEAD_DIM}"
    if not scaling > 0:
        return f"scaling {scaling} is not above zero"
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
    """`reference.sink_attention`; only the output and one number per row are kept for the backward pass."""
    if not torch.is_grad_enabled():
        out_BHTD, _ = sink_attention_forward(
            q_BHTD, k_BKSD, v_BKSD, sinks_H, scaling=scaling, window=window, documents_BS=documents_BS, tree=tree
        )
        return out_BHTD
    return _LibraryAttention.apply(
        q_BHTD, k_BKSD, v_BKSD, sinks_H, scaling, window, documents_BS, *(tree or (None, None))
    )


class _LibraryAttention(Function):
    @staticmethod
    def forward(ctx, q_BHTD, k_BKSD, v_BKSD, sinks_H, scaling, window, documents_BS, *tree):
        settings = {"scaling": scaling, "window": window, "documents_BS": documents_BS, "tree": _tree(tree)}
        out_BHTD, lse_BHT = sink_attention_forward(q_BHTD, k_BKSD, v_BKSD, sinks_H, **settings)
        ctx.save_for_backward(q_BHTD, k_BKSD, v_BKSD, sinks_H, out_BHTD, lse_BHT, documents_BS, *tree)
        ctx.scaling, ctx.window, ctx.isa = scaling, window, current_isa()
        return out_BHTD

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out_BHTD):
        *operands, documents_BS, depths_BS, visible_until_BS = ctx.saved_tensors
        settings = {"documents_BS": documents_BS, "tree": _tree((depths_BS, visible_until_BS))}
        gradients = running_in(ctx.isa, sink_attention_backward)(
            d_out_BHTD, *operands, scaling=ctx.scaling, window=ctx.window, **settings
        )
        return *gradients, None, None, None, None, None


def _tree(tensors: tuple[Tensor | None, Tensor | None]) -> Tree | None:
    depths_BS, visible_until_BS = tensors
    return None if depths_BS is None or visible_until_BS is None else Tree(depths_BS, visible_until_BS)


def sink_attention_forward(
    q_BHTD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    sinks_H: Tensor,
    *,
    scaling: float,
    window: int | None,
    documents_BS: Tensor | None,
    tree: Tree | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.sink_attention` and, for the backward pass, the logarithm of each softmax's denominator.

    Tensors may have any strides; one whose last dimension is not contiguous is copied. Check `refusal` first.

    Returns:
        out `[B, H, T, D]`, laid out as `[B, T, H, D]`, in the dtype of q; lse `[B, H, T]` in fp32, sink included.

    Raises:
        ValueError: if shapes do not fit together.
    """
    q_BHTD, k_BKSD, v_BKSD = (_rows_contiguous(tensor) for tensor in (q_BHTD, k_BKSD, v_BKSD))
    out_BHTD = _empty_by_token(q_BHTD)
    lse_BHT = q_BHTD.new_empty(q_BHTD.shape[:3], dtype=torch.float32)
    sinks_H, documents_BS, tree = _small_operands(sinks_H, documents_BS, tree)
    attention = _attention(q_BHTD, k_BKSD, v_BKSD, sinks_H, scaling, window, documents_BS, tree, out_BHTD, lse_BHT)
    if q_BHTD.numel():
        _call("gptoss_ft_attention_forward", q_BHTD.dtype, attention)
    return out_BHTD, lse_BHT


def sink_attention_backward(
    d_out_BHTD: Tensor,
    q_BHTD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    sinks_H: Tensor,
    out_BHTD: Tensor,
    lse_BHT: Tensor,
    *,
    scaling: float,
    window: int | None,
    documents_BS: Tensor | None,
    tree: Tree | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v and the sinks, given `out` and `lse` of the forward pass, in the operands' dtypes.

    Raises:
        ValueError: if shapes do not fit together.
    """
    if d_out_BHTD.shape != q_BHTD.shape:
        raise ValueError(f"d_out {tuple(d_out_BHTD.shape)} must be {tuple(q_BHTD.shape)}")
    q_BHTD, k_BKSD, v_BKSD = (_rows_contiguous(tensor) for tensor in (q_BHTD, k_BKSD, v_BKSD))
    d_out_BHTD = _rows_contiguous(d_out_BHTD.to(q_BHTD.dtype))
    dk_BKSD, dv_BKSD = _empty_by_token(k_BKSD), _empty_by_token(v_BKSD)
    # Every block of keys adds to it: fp32, whatever the dtype of q.
    dq_BHTD = torch.zeros(q_BHTD.shape)
    delta_BHT, dsinks_BH = torch.empty_like(lse_BHT), lse_BHT.new_empty(lse_BHT.shape[:2])
    fp32_sinks_H, documents_BS, tree = _small_operands(sinks_H, documents_BS, tree)
    attention = _attention(q_BHTD, k_BKSD, v_BKSD, fp32_sinks_H, scaling, window, documents_BS, tree, out_BHTD, lse_BHT)
    attention.d_out, attention.dk, attention.dv = (View.of(tensor) for tensor in (d_out_BHTD, dk_BKSD, dv_BKSD))
    attention.dq, attention.delta, attention.dsinks = (t.data_ptr() for t in (dq_BHTD, delta_BHT, dsinks_BH))
    if q_BHTD.numel():
        _call("gptoss_ft_attention_backward", q_BHTD.dtype, attention)
    else:
        dk_BKSD.zero_(), dv_BKSD.zero_(), dsinks_BH.zero_()
    return dq_BHTD.to(q_BHTD.dtype), dk_BKSD, dv_BKSD, dsinks_BH.sum(0).to(sinks_H.dtype)


def _attention(
    q_BHTD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    sinks_H: Tensor,
    scaling: float,
    window: int | None,
    documents_BS: Tensor | None,
    tree: Tree | None,
    out_BHTD: Tensor,
    lse_BHT: Tensor,
) -> _Attention:
    B, H, T, D = q_BHTD.shape
    K, S = k_BKSD.shape[1:3]
    if k_BKSD.shape != (B, K, S, D) or v_BKSD.shape != k_BKSD.shape or H % K or T > S:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (q_BHTD, k_BKSD, v_BKSD))
        raise ValueError(f"q, k and v {shapes} are not [B, H, T, D] and twice [B, K, S, D], K dividing H, T <= S")
    if sinks_H.shape != (H,):
        raise ValueError(f"sinks {tuple(sinks_H.shape)} must be {(H,)}")
    if documents_BS is not None and documents_BS.shape != (B, S):
        raise ValueError(f"documents {tuple(documents_BS.shape)} must be {(B, S)}")
    if tree is not None and any(array.shape != (B, S) for array in tree):
        raise ValueError(f"a tree of {', '.join(str(tuple(array.shape)) for array in tree)} must be {(B, S)}")
    if window is not None and window < 1:
        raise ValueError(f"window {window} must be 1 or more: a query sees itself")
    return _Attention(
        *(B, H, K, T, S, D, S if window is None or tree else min(window, S)),
        None if documents_BS is None else documents_BS.data_ptr(),
        *((None, None) if tree is None else (array.data_ptr() for array in tree)),
        S if window is None else min(window, S),
        *(sinks_H.data_ptr(), lse_BHT.data_ptr()),
        *(View.of(tensor) for tensor in (q_BHTD, k_BKSD, v_BKSD, out_BHTD)),
        scaling=scaling,
    )


def _call(name: str, dtype: torch.dtype, attention: _Attention) -> None:
    # isa, threads, dtype, attention
    check(function(name, INT, INT, INT, ctypes.POINTER(_Attention))(*common(dtype), attention))


def _rows_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _empty_by_token(like_BHTD: Tensor) -> Tensor:
    B, H, T, D = like_BHTD.shape
    return like_BHTD.new_empty(B, T, H, D).transpose(1, 2)


def _small_operands(
    sinks_H: Tensor, documents_BS: Tensor | None, tree: Tree | None
) -> tuple[Tensor, Tensor | None, Tree | None]:
    documents = None if documents_BS is None else documents_BS.to(torch.int32).contiguous()
    tree = tree and Tree(*(array.to(torch.int32).contiguous() for array in tree))
    return sinks_H.detach().float().contiguous(), documents, tree
