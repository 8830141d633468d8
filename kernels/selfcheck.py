"""Whether an implementation computes what it should on the device at hand.

A kernel can be right where it was written and wrong where it runs: another processor, compiler, driver or version. So
each is compared with the reference in fp64 when it is first used, on operands of a few KB.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gptoss_ft.kernels.cases import Call
from gptoss_ft.kernels.reference import LayerWeights

# fp32 torch adds in more partial sums than a kernel has registers and hardly errs on a few hundred terms. Twice so
# little would fail kernels for the order of their additions.
FLOOR = 2.0**-19

_ALLOCATIONS = {
    *(torch.empty, torch.empty_like, torch.empty_strided),
    *(Tensor.new_empty, Tensor.new_empty_strided),
}


class Verdict(NamedTuple):
    """Largest difference from fp64, and the largest allowed, both as a share of the largest number in the result.

    `fault` is the exception that ended the check, if one did.
    """

    error: float
    budget: float
    fault: str = ""

    @property
    def passed(self) -> bool:
        return not self.fault and self.error <= self.budget

    @property
    def reason(self) -> str:
        found = self.fault or f"error {self.error:.1e} against fp64, allowed {self.budget:.1e}"
        return f"failed its self-check ({found}): please report this with the output of `gptoss-ft doctor`"


class _PoisonedMemory(TorchFunctionMode):
    """Fresh floating tensors hold NaN, so that an element that no kernel writes shows."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        return result.fill_(math.nan) if func in _ALLOCATIONS and result.is_floating_point() else result


def measure(
    function: Callable[..., Any],
    reference: Callable[..., Any],
    call: Call,
    *,
    exact: bool = False,
    differentiable: bool = False,
    poisoned: bool = False,
) -> Verdict:
    """Compare `function` with `reference` in fp64, and their gradients if they are `differentiable`.

    Twice the error of `reference` in the operands' own dtype is allowed; if `exact`, no difference from its result.
    Of several results the worst counts. If `poisoned`, `function` runs again in memory that holds NaN. An exception of
    it is a verdict; one of `reference` is raised.
    """
    device_type = next(operand.device.type for operand in call.args if isinstance(operand, Tensor))
    results = _results_and_gradients if differentiable else _results
    with torch.autocast(device_type, enabled=False):
        truths, plains = results(reference, _in_fp64(call)), results(reference, call)
        try:
            compared = [*zip(results(function, call), plains, truths, strict=True)]
            if poisoned:
                with _PoisonedMemory():
                    compared += zip(results(function, call), plains, truths, strict=True)
        except Exception as error:  # from a compiler, a driver, a library: whatever it is, the next one runs
            first_line = (str(error).strip().splitlines() or [""])[0]
            return Verdict(math.nan, math.nan, f"{type(error).__name__}: {first_line}")
    verdicts = [_compare(*tensors, exact=exact) for tensors in compared]
    return worst(verdicts)


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    """The first that failed, or else the one of the largest error."""
    return max(verdicts, key=lambda verdict: verdict.error if verdict.passed else math.inf)


def error_of_reference(reference: Callable[..., Any], call: Call, *, differentiable: bool) -> float:
    """The error of plain torch in the operands' own dtype, measured as for a `Verdict`."""
    return measure(reference, reference, call, differentiable=differentiable).error


def _compare(ours: Tensor, plain: Tensor, truth: Tensor, *, exact: bool) -> Verdict:
    if ours.shape != plain.shape or ours.dtype != plain.dtype:
        got, wanted = (f"{tuple(result.shape)} {result.dtype}" for result in (ours, plain))
        return Verdict(math.nan, math.nan, f"the result is {got}, not {wanted}")
    if exact:
        truth = plain.double()
    size = truth.abs().max()
    error, usual = (float((result.double() - truth).abs().max() / size) for result in (ours, plain))
    return Verdict(error, 0.0 if exact else max(2 * usual, FLOOR))


def _results(function: Callable[..., Any], call: Call) -> list[Tensor]:
    """What `function` returns, or its first argument where, by torch's convention, it changes that in place."""
    # Copies, because what runs next needs them as they were.
    args = [operand.clone() if isinstance(operand, Tensor) else operand for operand in call.args]
    with torch.no_grad():
        found = function(*args, **call.kwargs)
    return _tensors(args[0] if found is None else found)


def _results_and_gradients(function: Callable[..., Any], call: Call) -> list[Tensor]:
    """What `function` returns, and the gradients of all its float arguments for some gradient of each result."""
    args = tuple(operand.detach().requires_grad_() if _is_float(operand) else operand for operand in call.args)
    with torch.enable_grad():
        results = _tensors(function(*args, **call.kwargs))
        # Numbers without a pattern, and without a random generator.
        seeds = [torch.arange(t.numel(), device=t.device).double().square().cos().view_as(t).to(t) for t in results]
        leaves = [operand for operand in args if _is_float(operand)]
        gradients = torch.autograd.grad(results, leaves, seeds, allow_unused=True, materialize_grads=True)
    return [*(result.detach() for result in results), *gradients]


def _tensors(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


def _is_float(operand: Any) -> bool:
    return isinstance(operand, Tensor) and operand.is_floating_point()


def _in_fp64(call: Call) -> Call:
    def converted(operand: Any) -> Any:
        if isinstance(operand, torch.dtype):
            return torch.float64
        if isinstance(operand, LayerWeights):
            return LayerWeights(**{name: converted(value) for name, value in vars(operand).items()})
        return operand.double() if _is_float(operand) else operand

    return Call(tuple(map(converted, call.args)), call.kwargs)
