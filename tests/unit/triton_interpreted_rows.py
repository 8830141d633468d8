"""The Triton kernels for rows in Triton's interpreter, under the fixture and the bounds of `triton_interpreted`."""

from typing import Any

import pytest
import torch
from triton import language as tl
from triton.runtime import interpreter
from triton_interpreted import assert_as_exact_as_torch, fenced, poisoned_memory

from gptoss_ft.kernels import reference
from gptoss_ft.kernels.gpu import row_kernels, rows

__all__ = ["poisoned_memory"]

DTYPES = (torch.float32, torch.bfloat16)
CONSTANTS = {"alpha": 1.702, "limit": 7.0}
# One; no multiple of anything; two tiles, of which the second has a remainder.
COLUMNS = (1, 51, 1100)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", COLUMNS)
def test_activation_and_its_gradients_err_like_plain_torch(columns, dtype):
    gate_up, d_z, weights = (
        (2 * torch.randn(7, 2 * columns)).to(dtype),
        torch.randn(7, columns).to(dtype),
        torch.rand(7),
    )
    at_limits = torch.tensor([[7, 7], [-7, -7], [50, 50], [-200, 1], [-1e30, 1], [-20, 3], [0, -7.5]], dtype=dtype)
    if columns > 1:  # the interpreter drops bits of the largest of them, at which plain torch hardly errs
        gate_up[:, :2] = at_limits

    def autograd(dtype):
        h, w = gate_up.to(dtype).requires_grad_(), weights.to(dtype).requires_grad_()
        act = reference.clamped_swiglu(h, **CONSTANTS)
        z = w[:, None] * act
        return act.detach(), z.detach(), *torch.autograd.grad(z, (h, w), d_z.to(dtype))

    act = rows.clamped_swiglu(fenced(gate_up), **CONSTANTS)
    z, d_gate_up, d_weights = rows.weighted_swiglu_backward(fenced(gate_up), fenced(d_z), fenced(weights), **CONSTANTS)
    assert d_weights.dtype == torch.float32
    ours = (act, z, d_gate_up, d_weights.to(dtype))
    for results in zip(ours, autograd(dtype), autograd(torch.float64), strict=True):
        assert_as_exact_as_torch(*results)


def test_activations_of_any_shape_and_strides():
    gate_up = torch.randn(3, 5, 2 * 40)
    expected = reference.clamped_swiglu(gate_up)
    for given in (gate_up, gate_up.transpose(0, 1).contiguous().transpose(0, 1)):
        torch.testing.assert_close(rows.clamped_swiglu(given), expected)
    assert rows.clamped_swiglu(gate_up[:0]).shape == (0, 5, 40)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_nan(dtype):
    gate_up = torch.zeros(1, 2 * 40, dtype=dtype)
    gate_up[0, 10], gate_up[0, 31] = torch.nan, torch.nan
    assert rows.clamped_swiglu(gate_up).isnan()[0].nonzero().flatten().tolist() == [5, 15]
    given = gate_up, torch.ones(1, 40, dtype=dtype), torch.ones(1)
    ours, theirs = rows.weighted_swiglu_backward(*given), reference.weighted_swiglu_backward(*given)
    assert all(torch.equal(one.isnan(), other.isnan()) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("choices", [1, 4])
def test_combine_errs_like_plain_torch(columns, choices, dtype):
    y, weights = torch.randn(6 * choices, columns).to(dtype), torch.rand(6, choices)
    slots = torch.randperm(6 * choices).view(6, choices)
    for w in (weights, weights.to(dtype), None):
        assert_as_exact_as_torch(
            rows.combine(fenced(y), slots, w),
            reference.combine(y, slots, w),
            reference.combine(y.double(), slots, None if w is None else w.double()),
        )


def test_a_slot_that_is_no_row_shows():
    y, slots = torch.randn(5, 8), torch.tensor([[0, 1], [5, 0], [2, -1], [3, 4]])
    assert rows.combine(fenced(y), slots, None).isnan().all(1).tolist() == [False, True, True, False]


def test_offsets_past_the_range_of_32_bits(monkeypatch):
    # Memory that nobody touches costs nothing; fresh tensors must not be filled.
    torch.use_deterministic_algorithms(False)
    T, I = 800_000, 2880
    gate_up, act = torch.empty(T, 2 * I, dtype=torch.bfloat16), torch.empty(T, I, dtype=torch.bfloat16)
    act[-2:] = torch.randn(2, I)
    assert act.numel() > 2**31
    found = rows.combine(act, torch.tensor([[T - 1, T - 2]]), None)[0]
    torch.testing.assert_close(found.float(), act[-2:].float().sum(0), rtol=2**-7, atol=1e-3)

    # The last program alone, of each.
    number = interpreter.InterpreterBuilder.create_get_program_id
    first = 0

    def shifted(builder: Any, axis: int) -> Any:
        return interpreter.TensorHandle(number(builder, axis).data + first, tl.int32)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_get_program_id", shifted)
    gate_up[-1], d_z, weights = torch.randn(2 * I), act, torch.empty(T)
    weights[-1] = 0.5
    first = T * I // rows.TILE - 1
    row_kernels.clamped_swiglu_kernel[(1,)](gate_up, act, T * I, 1.702, 7.0, N_=rows.TILE)
    expected = reference.clamped_swiglu(gate_up[-1].float())[-rows.TILE :]
    torch.testing.assert_close(act[-1, -rows.TILE :].float(), expected, rtol=2**-7, atol=1e-3)

    # The first program, of fewer columns than 2^31 of which gate and up are more.
    first, gate_up[0] = 0, torch.randn(2 * I)
    row_kernels.clamped_swiglu_kernel[(1,)](gate_up, act, 2**30, 1.702, 7.0, N_=rows.TILE)
    expected = reference.clamped_swiglu(gate_up[0].float())[: rows.TILE]
    torch.testing.assert_close(act[0, : rows.TILE].float(), expected, rtol=2**-7, atol=1e-3)

    first, (z, d_gate_up, d_weights) = T - 1, map(torch.empty_like, (d_z, gate_up, weights))
    arguments = (gate_up, d_z, weights, z, d_gate_up, d_weights, 1.702, 7.0)
    row_kernels.weighted_swiglu_backward_kernel[(1,)](*arguments, I=I, I_=rows.TILE)
    given = gate_up[-1:].float(), d_z[-1:].float(), weights[-1:]
    for ours, theirs in zip((z, d_gate_up, d_weights), reference.weighted_swiglu_backward(*given), strict=True):
        torch.testing.assert_close(ours[-1:].float(), theirs, rtol=2**-7, atol=1e-3)


def test_mistakes_are_errors_and_reach_no_kernel():
    y = torch.randn(5, 32)
    with pytest.raises(ValueError, match=r"weights \(1, 1\) must be \(1, 2\)"):
        rows.combine(y, torch.tensor([[0, 4]]), torch.ones(1, 1))
    with pytest.raises(ValueError, match=r"must be \[..., 2·I\]"):
        rows.clamped_swiglu(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"are not \[T, 2·I\], \[T, I\] and \[T\]"):
        rows.weighted_swiglu_backward(torch.zeros(2, 4), torch.zeros(2, 3), torch.ones(2))
