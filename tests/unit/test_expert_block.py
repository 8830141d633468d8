"""The expert block as one autograd function: against autograd over plain torch, and what it keeps and refuses."""

from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from gptoss_ft.kernels import cpu_library, dispatch, reference, verdicts
from gptoss_ft.kernels.experts import ExpertProjection, expert_block
from gptoss_ft.kernels.gpu import dense_experts
from gptoss_ft.kernels.low_rank import LowRank
from gptoss_ft.kernels.reference import MXFP4Weight

E, H, I, T = 5, 64, 96, 23
CONSTANTS = {"alpha": 1.702, "limit": 7.0}
NAMES = ("hidden", "routing", "A of gate_up", "B of gate_up", "A of down", "B of down")


class Layer:
    """Random operands of a block; `leaves` are what it is differentiated in, LoRA in PEFT's layouts."""

    def __init__(self, *, dtype, tokens=T, choices=2, ranks=3, packed=True, factor_dtype=None, experts=None):
        generator = torch.Generator().manual_seed(0)

        def normal(*shape):
            return torch.randn(shape, generator=generator)

        def projection(num_out, num_in):
            blocks = torch.randint(0, 256, (E, num_out, num_in // 32, 16), generator=generator, dtype=torch.uint8)
            scales = torch.randint(118, 124, (E, num_out, num_in // 32), generator=generator, dtype=torch.uint8)
            weight = MXFP4Weight(blocks, scales)
            dense = reference.dequantize_mxfp4(*weight, dtype).mT.contiguous()
            return ExpertProjection(weight if packed else dense, normal(E, num_out).to(dtype))

        self.dtype = dtype
        self.gate_up, self.down = projection(2 * I, H), projection(H, I)
        self.experts, self.scaling = experts, 1.5
        # Expert 3 is never chosen, and the first token chooses one twice.
        chosen = torch.tensor([0, 1, 2, 4])
        rows = [chosen[torch.randperm(4, generator=generator)[:choices]] for _ in range(tokens)]
        self.experts_TK = torch.stack(rows) if tokens else torch.zeros(0, choices, dtype=torch.long)
        self.experts_TK[:1] = self.experts_TK[:1, :1]
        shapes = ((ranks * E, H), (2 * I, ranks * E), (ranks * E, I), (H, ranks * E))
        factors = [(0.2 * normal(*shape)).to(factor_dtype or dtype) for shape in shapes]
        routing = torch.rand(tokens, choices, generator=generator).softmax(-1)
        self.leaves = [normal(tokens, H).to(dtype), routing.to(dtype), *factors]
        self.d_out = normal(tokens, H).to(dtype)

    def projections(self, leaves):
        def low_rank(A, B):
            B_EOR = B.view(B.shape[0], -1, E).permute(2, 0, 1)
            return [LowRank(A.view(E, -1, A.shape[1]), B_EOR, self.scaling, self.experts)]

        return replace(self.gate_up, low_rank=low_rank(*leaves[2:4])), replace(
            self.down, low_rank=low_rank(*leaves[4:])
        )

    def block(self, leaves):
        return expert_block(leaves[0], self.experts_TK, leaves[1], *self.projections(leaves), **CONSTANTS)

    def plain(self, leaves):
        """The same by torch's autograd over dense weights, expert by expert, in the dtype of the leaves."""
        dtype, hidden, routing = leaves[0].dtype, leaves[0], leaves[1]
        gate_up, down = self.projections(leaves)
        out = torch.zeros_like(hidden)
        for e in range(E):
            tokens, choices = (self.experts_TK == e).nonzero(as_tuple=True)
            act = reference.clamped_swiglu(self.plain_projection(gate_up, e, hidden[tokens], dtype), **CONSTANTS)
            y = self.plain_projection(down, e, act, dtype) * routing[tokens, choices, None]
            out = out.index_add(0, tokens, y)
        return out

    def plain_projection(self, projection, e, x, dtype):
        weight = projection.weight
        w = reference.dequantize_mxfp4(*weight, dtype)[e].mT if isinstance(weight, MXFP4Weight) else weight[e].to(dtype)
        y = torch.addmm(projection.bias_EO[e].to(dtype), x, w)
        for update in projection.low_rank:
            if update.experts is None or e in update.experts:
                A, B = update.A_ERI[e].to(dtype), update.B_EOR[e].to(dtype)
                y = y + update.scaling * ((x @ A.T) @ B.T)
        return y

    def run(self, function, dtype=None):
        """The result and the gradients of the leaves."""
        leaves = [leaf.detach().to(dtype or leaf.dtype).requires_grad_() for leaf in self.leaves]
        out = function(leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, self.d_out.to(out.dtype))


CASES = {
    "bf16": {"dtype": torch.bfloat16},
    "fp32": {"dtype": torch.float32},
    "bf16 with fp32 LoRA": {"dtype": torch.bfloat16, "factor_dtype": torch.float32},
    "dense": {"dtype": torch.bfloat16, "packed": False},
    "one expert a token": {"dtype": torch.bfloat16, "choices": 1},
    "one token": {"dtype": torch.bfloat16, "tokens": 1},
    "no token": {"dtype": torch.bfloat16, "tokens": 0},
    "two experts adapted": {"dtype": torch.bfloat16, "experts": frozenset({1, 3})},
    "rank 17": {"dtype": torch.float32, "ranks": 17},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.usefixtures("isa", "poisoned_memory")
def test_result_and_gradients_err_at_most_twice_as_much_as_plain_torch(case, assert_as_exact_as_torch):
    layer = Layer(**case)
    ours, plain = layer.run(layer.block), layer.run(layer.plain)
    truth = layer.run(layer.plain, torch.float64)
    for name, *results in zip(("out", *NAMES), ours, plain, truth, strict=True):
        assert_as_exact_as_torch(*results, name)


def test_dense_experts_run_as_on_a_gpu_and_err_at_most_twice_as_much_as_plain_torch(
    monkeypatch, tmp_path, assert_as_exact_as_torch
):
    monkeypatch.setattr(verdicts, "_verdicts", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ran = []

    def counted(function):
        return lambda *arguments: ran.append(function) or function(*arguments)

    for operation in (dispatch.grouped_dense, dispatch.grouped_dense_dx):
        (made,) = (made for made in operation.implementations if made.name == "grouped_mm")
        name, function = "as on a GPU", counted(made.function)
        made = replace(made, name=name, function=function, device_type="cpu", unavailable=lambda *_: "")
        monkeypatch.setattr(operation, "implementations", (made,))
        assert operation.verdict(made, torch.device("cpu"), torch.bfloat16).passed
    layer = Layer(dtype=torch.bfloat16, packed=False, factor_dtype=torch.float32)
    ran.clear()
    ours, plain, truth = layer.run(layer.block), layer.run(layer.plain), layer.run(layer.plain, torch.float64)
    assert ran == 2 * [dense_experts.grouped_dense_dx] + 2 * [dense_experts.grouped_dense]
    for name, *results in zip(("out", *NAMES), ours, plain, truth, strict=True):
        assert_as_exact_as_torch(*results, name)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "dense"])
def test_fp64_runs_in_the_reference_and_equals_autograd(packed):
    layer = Layer(dtype=torch.float64, packed=packed)
    for name, one, other in zip(("out", *NAMES), layer.run(layer.block), layer.run(layer.plain), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")
    small = Layer(dtype=torch.float64, packed=packed, tokens=2, ranks=1)
    leaves = [leaf.requires_grad_() for leaf in small.leaves]
    assert torch.autograd.gradcheck(lambda *leaves: small.block(leaves), leaves, fast_mode=True)


def test_plain_torch_runs_without_a_library(monkeypatch, assert_as_exact_as_torch):
    monkeypatch.setattr(cpu_library, "fault", lambda: cpu_library.NOT_BUILT)
    layer = Layer(dtype=torch.bfloat16)
    truth = layer.run(layer.plain, torch.float64)
    for name, *results in zip(("out", *NAMES), layer.run(layer.block), layer.run(layer.plain), truth, strict=True):
        assert_as_exact_as_torch(*results, name)


def test_experts_without_rows_have_zero_gradients_in_the_layout_of_the_parameters():
    layer = Layer(dtype=torch.bfloat16)
    *_, dA, dB = layer.run(layer.block)
    assert dA.is_contiguous() and dB.is_contiguous()
    assert not dA.view(E, -1, I)[3].any() and not dB.view(H, -1, E)[..., 3].any()
    for e in (0, 1, 2, 4):
        assert dA.view(E, -1, I)[e].any() and dB.view(H, -1, E)[..., e].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_several_updates_add_up(dtype):
    layer = Layer(dtype=dtype)
    *leaves, A, B = (leaf.clone().requires_grad_() for leaf in layer.leaves)
    gate_up, down = layer.projections([*leaves, A, B])
    (update,) = down.low_rank
    twice = [update, replace(update, scaling=0.5, experts=frozenset({0, 2}))]
    whole = [replace(update, experts=frozenset({0, 2}), scaling=2.0), replace(update, experts=frozenset({1, 4}))]
    results = []
    for updates in (twice, whole):
        out = expert_block(
            leaves[0], layer.experts_TK, leaves[1], gate_up, replace(down, low_rank=updates), **CONSTANTS
        )
        results.append((out, *torch.autograd.grad(out, (leaves[0], A, B), layer.d_out)))
    for one, other in zip(*results, strict=True):
        distance = (one - other).double().norm() / other.double().norm()
        assert distance < (1e-12 if dtype == torch.float64 else 2**-7)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (3,), (4, 5), (0, 1)], ids=lambda n: NAMES[n[0]])
def test_what_needs_no_gradient_changes_none_of_the_others(needed):
    layer = Layer(dtype=torch.bfloat16)
    expected = layer.run(layer.block)[1:]
    leaves = [leaf.clone().requires_grad_(i in needed) for i, leaf in enumerate(layer.leaves)]
    layer.block(leaves).backward(layer.d_out)
    for i, leaf in enumerate(leaves):
        assert (leaf.grad is not None) == (i in needed)
        assert leaf.grad is None or torch.equal(leaf.grad, expected[i])


@pytest.mark.usefixtures("isa")
def test_every_number_of_threads_gives_the_same_bits(with_threads):
    layer = Layer(dtype=torch.bfloat16, tokens=100)
    first, *others = with_threads(lambda: layer.run(layer.block))
    for other in others:
        assert all(torch.equal(one, another) for one, another in zip(first, other, strict=True))


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "dense"])
def test_nothing_is_kept_but_what_is_documented(packed):
    layer = Layer(dtype=torch.bfloat16, packed=packed)
    leaves = [leaf.clone().requires_grad_() for leaf in layer.leaves]
    kept: dict[int, int] = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    given = [*leaves, layer.gate_up.bias_EO, layer.down.bias_EO]
    for projection in (layer.gate_up, layer.down):
        given += projection.weight if packed else [projection.weight]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = layer.block(leaves)
    arguments = {tensor.untyped_storage().data_ptr() for tensor in given}
    own = [size for address, size in kept.items() if address not in arguments]
    N, R = 2 * T, 3
    assert sorted(own) == sorted([8 * N, 2 * N * 2 * I, 4 * N * R, 4 * N * R])
    out.backward(layer.d_out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_gradient_checkpointing_gives_the_same_bits(dtype):
    layer = Layer(dtype=dtype)
    again = layer.run(lambda leaves: checkpoint(layer.block, leaves, use_reentrant=False))
    assert all(torch.equal(one, other) for one, other in zip(layer.run(layer.block), again, strict=True))


@pytest.mark.parametrize("wrong", [-1, E])
def test_a_choice_that_is_no_expert_is_an_error(wrong):
    layer = Layer(dtype=torch.float32)
    layer.experts_TK[3, 1] = wrong
    with pytest.raises(ValueError, match="numbers from 0 to 4"):
        layer.block(layer.leaves)


def test_a_second_derivative_is_refused():
    layer = Layer(dtype=torch.float64)
    leaves = [leaf.requires_grad_() for leaf in layer.leaves]
    (d_hidden,) = torch.autograd.grad(layer.block(leaves).square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        d_hidden.sum().backward()


def test_an_argument_changed_between_the_passes_is_noticed():
    layer = Layer(dtype=torch.bfloat16)
    leaves = [leaf.clone().requires_grad_() for leaf in layer.leaves]
    out = layer.block(leaves)
    with torch.no_grad():
        leaves[4].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(layer.d_out)


def test_dense_weights_and_biases_may_be_trained():
    layer = Layer(dtype=torch.float64, packed=False)
    trained = [tensor.requires_grad_() for p in (layer.gate_up, layer.down) for tensor in (p.weight, p.bias_EO)]
    leaves = [leaf.requires_grad_() for leaf in layer.leaves]
    gradients = [
        torch.autograd.grad(function(leaves), trained + leaves, layer.d_out) for function in (layer.block, layer.plain)
    ]
    for one, other in zip(*gradients, strict=True):
        assert other.any()
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
