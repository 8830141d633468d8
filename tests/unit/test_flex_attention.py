"""Attention through flex_attention: its arithmetic, gradients and masks in torch's uncompiled mode on the CPU.

That mode forms every score, and torch refuses gradients in it on a CPU; both are switched here. What GPUs run is the
same graph compiled by torch, which these tests trace but cannot run.
"""

import gc
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex

from gptoss_ft.kernels import flex_attention, reference

B, H, K, T, D, SCALING = 2, 4, 2, 150, 16, 0.3


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex_attention, "_compiled", lambda function: function)
    flex_attention._causal_mask.cache_clear()


def operands(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v and sinks, some of which outweigh everything else."""
    shapes = (B, H, T, D), (B, K, T, D), (B, K, T, D), (H,)
    return [torch.randn(shape, dtype=torch.float64).to(dtype).mul_(2).requires_grad_() for shape in shapes]


def packed_documents() -> Tensor:
    """A short document, one longer than a block of the mask, and padding; beside them a sequence of one document."""
    first = torch.cat([torch.full((n,), number) for n, number in ((9, 3), (131, 4), (10, -1))])
    return torch.stack((first, torch.zeros(T, dtype=torch.int64)))


def plain(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, window: int | None, documents: Tensor | None) -> Tensor:
    """A softmax over every score, with the sink as one more; what a query sees is told pair by pair."""
    numbers = [[0] * T] * B if documents is None else documents.tolist()
    sees = torch.tensor(
        [
            [
                [key <= query < key + (window or T) and own[query] == own[key] >= 0 for key in range(T)]
                for query in range(T)
            ]
            for own in numbers
        ]
    )
    k, v = (tensor.repeat_interleave(H // K, dim=1) for tensor in (k, v))
    scores = (q @ k.mT * SCALING).masked_fill(~sees[:, None], -torch.inf)
    sink = sinks.view(1, H, 1, 1).expand(B, H, T, 1)
    return torch.cat((scores, sink), dim=-1).softmax(-1)[..., :-1] @ v


@pytest.mark.parametrize("documents", [None, packed_documents()], ids=["one", "packed"])
@pytest.mark.parametrize("window", [None, 1, 7, 140], ids=str)
def test_output_and_gradients_are_those_of_a_softmax_with_one_more_logit(window, documents):
    torch.manual_seed(0)
    inputs, d_out = operands(), torch.randn(B, H, T, D, dtype=torch.float64)
    out = flex_attention.sink_attention(*inputs, scaling=SCALING, window=window, documents_BS=documents)
    truth = plain(*inputs, window, documents)
    torch.testing.assert_close(out, truth, rtol=0, atol=1e-13)
    gradients = (torch.autograd.grad(result, inputs, d_out) for result in (out, truth))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [None, 7], ids=str)
def test_trees_are_as_in_the_reference(window):
    depths, until = torch.arange(T).repeat(B, 1), torch.full((B, T), T)
    fork, root = T // 2, T // 4
    depths[0, fork:] += root + 1 - fork
    until[0, root + 1 : fork] = fork
    documents, tree = packed_documents(), reference.Tree(depths, until)
    for numbers in (None, documents):
        inputs = operands()
        settings = {"scaling": SCALING, "window": window, "documents_BS": numbers, "tree": tree}
        ours, truth = flex_attention.sink_attention(*inputs, **settings), reference.sink_attention(*inputs, **settings)
        torch.testing.assert_close(ours, truth.nan_to_num(), rtol=0, atol=1e-13)


def test_padding_sees_nothing_and_gives_zeros():
    documents = packed_documents()
    out = flex_attention.sink_attention(*operands(), scaling=SCALING, window=None, documents_BS=documents)
    padding = documents[0] < 0
    assert padding.any() and (out[0, :, padding] == 0).all()
    assert (out[0, :, ~padding] != 0).any(-1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_low_precision_errs_at_most_twice_as_much_as_plain_torch(dtype):
    torch.manual_seed(1)
    inputs, documents = operands(dtype), packed_documents()
    d_out = torch.randn(B, H, T, D).to(dtype)
    doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
    ours = flex_attention.sink_attention(*inputs, scaling=SCALING, window=100, documents_BS=documents)
    theirs, truth = plain(*inputs, 100, documents), plain(*doubles, 100, documents)
    assert ours.dtype == dtype
    results = (
        (result, *torch.autograd.grad(result, leaves, d_out.to(result.dtype)))
        for result, leaves in ((ours, inputs), (theirs, inputs), (truth, doubles))
    )
    for name, kernel, baseline, exact in zip(("out", "q", "k", "v", "sinks"), *results, strict=True):
        error, budget = ((tensor.double() - exact).abs().max() for tensor in (kernel, baseline))
        assert error <= 2 * budget, f"{name}: {error:.1e} > 2 x {budget:.1e}"


def test_the_compiler_traces_it_whole_with_its_gradients(monkeypatch):
    def traced(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return torch.compile(function, fullgraph=True, backend="aot_eager")

    torch.manual_seed(2)
    documents, inputs = packed_documents(), operands(torch.float32)
    arguments = {"scaling": SCALING, "window": 7, "documents_BS": documents}
    expected = flex_attention.sink_attention(*inputs, **arguments)
    flex_attention._masks_of_documents.clear()
    monkeypatch.setattr(flex_attention, "_compiled", traced)
    found = flex_attention.sink_attention(*inputs, **arguments)
    gradients = (torch.autograd.grad(result.square().sum(), inputs) for result in (found, expected))
    for ours, theirs in zip((found, *next(gradients)), (expected, *next(gradients)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_lengths_may_differ_between_calls_but_heads_and_windows_stay_constants(monkeypatch):
    graphs = []

    def recorded(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., Tensor]:
            graphs.append(graph)
            return graph.forward

        return torch.compile(function, fullgraph=True, backend=backend)

    monkeypatch.setattr(flex_attention, "_compiled", recorded)
    torch.compiler.reset()
    # A self-check's shapes before two batches of a model's.
    for heads, groups, length, size, window in ((6, 2, 75, 40, 9), (4, 2, 150, 16, 133), (4, 2, 161, 16, 133)):
        q, k, v = (torch.randn(1, number, length, size) for number in (heads, groups, groups))
        flex_attention.sink_attention(q, k, v, torch.randn(heads), scaling=1.0, window=window, documents_BS=None)
    attend = graphs[-1]
    inputs = [node.meta["example_value"] for node in attend.graph.nodes if node.op == "placeholder"]
    states = [
        found.shape for found in inputs if isinstance(found, Tensor) and found.ndim == 4 and found.shape[-1] == 16
    ]
    assert [(number, size) for _, number, _, size in states] == [(4, 16), (2, 16), (2, 16)]
    assert all(type(number) is type(size) is int for _, number, _, size in states)
    assert all(isinstance(length, torch.SymInt) for _, _, length, _ in states)
    assert any("133" in part.code for part in attend.modules() if isinstance(part, torch.fx.GraphModule))


def test_new_documents_and_lengths_are_not_compiled_again(monkeypatch):
    graphs = []

    @cache
    def recorded(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., Tensor]:
            graphs.append(graph)
            return graph.forward

        return torch.compile(function, fullgraph=True, backend=backend)

    def step(length: int) -> None:
        documents = torch.randint(-1, 3, (1, length)).sort(-1).values
        q, k, v = (torch.randn(1, number, length, D, requires_grad=True) for number in (H, K, K))
        sinks = torch.randn(H)
        flex_attention.sink_attention(q, k, v, sinks, scaling=SCALING, window=7, documents_BS=documents)

    monkeypatch.setattr(flex_attention, "_compiled", recorded)
    torch.compiler.reset()
    step(75), step(150)
    known = len(graphs)
    for length in (150, 161, 256, 640):
        step(length)
    assert 0 < known == len(graphs)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Grows with every mask that is built and not taken from those that are kept."""
    found: list[object] = []
    build = flex_attention._build_mask
    monkeypatch.setattr(flex_attention, "_build_mask", lambda *given: found.append(given) or build(*given))
    return found


def forked_tree() -> reference.Tree:
    """In each row a branch of T/2 tokens beside another, from the first quarter."""
    depths, until = torch.arange(T).repeat(B, 1), torch.full((B, T), T)
    depths[:, T // 2 :] -= T // 4
    until[:, T // 4 : T // 2] = T // 2
    return reference.Tree(depths, until)


@pytest.mark.parametrize("trees", [False, True])
def test_a_mask_is_built_once_for_the_tensors_that_tell_of_documents_and_dropped_with_them(built, trees):
    documents, masks = packed_documents(), flex_attention._masks_of_documents
    tree = forked_tree() if trees else None
    gc.collect()
    before = len(masks)
    mask = flex_attention._documents_mask(documents, tree, 7)
    assert flex_attention._documents_mask(documents, tree, 7) is mask
    assert flex_attention._documents_mask(documents, tree, None) is not mask
    assert len(built) == 2
    documents[1, :70] = 5
    changed = flex_attention._documents_mask(documents, tree, 7)
    if tree is not None:
        tree.visible_until_BS[:, 0] = 9
        forked = flex_attention._documents_mask(documents, tree, 7)
        other = reference.Tree(tree.depths_BS.clone(), tree.visible_until_BS)
        assert len({id(found) for found in (changed, forked, flex_attention._documents_mask(documents, other, 7))}) == 3
        assert flex_attention._documents_mask(None, tree, 7) is flex_attention._documents_mask(None, tree, 7)
        del other
    assert len(built) == (6 if trees else 3) and len(masks) == before + 1 + trees
    del documents, tree
    gc.collect()
    assert len(masks) == before


def test_masks_kept_in_inference_mode_serve_autograd_later():
    documents, inputs = packed_documents(), operands()
    for numbers, tree in ((None, None), (documents, None), (documents, forked_tree())):
        arguments = {"scaling": SCALING, "window": 7, "documents_BS": numbers, "tree": tree}
        with torch.inference_mode():
            expected = flex_attention.sink_attention(*inputs, **arguments)
        out = flex_attention.sink_attention(*inputs, **arguments)
        assert torch.equal(out, expected)
        assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(out.sum(), inputs))


def test_documents_made_in_inference_mode_may_be_written_to(built):
    with torch.inference_mode():
        documents = packed_documents()
        for last in (0, 1):
            documents[1, -70:] = last
            inputs, arguments = operands(), {"scaling": SCALING, "window": None, "documents_BS": documents}
            truth = reference.sink_attention(*inputs, **arguments).nan_to_num()
            torch.testing.assert_close(flex_attention.sink_attention(*inputs, **arguments), truth, rtol=0, atol=1e-13)
    assert len(built) == 2


def test_it_refuses_generation_and_tiny_heads_in_words():
    q, k = torch.empty(1, 4, 8, 16), torch.empty(1, 2, 8, 16)
    assert flex_attention.refusal(q, k, k) == ""
    assert "1 queries of 8 keys" in flex_attention.refusal(q[:, :, :1], k, k)
    assert "head dimension 8" in flex_attention.refusal(q[..., :8], k[..., :8], k)
