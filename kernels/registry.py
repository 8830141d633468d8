"""Operations with several implementations: the fastest that takes the tensors and passed its self-check runs.

Nothing is skipped silently. An implementation that does not run says why, in the log once and in `gptoss-ft doctor`
always; `dispatch` lists the operations.
"""

import logging
import math
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import product
from typing import Generic, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from gptoss_ft.kernels import selfcheck, verdicts
from gptoss_ft.kernels.cases import AWKWARD, Case, Draw, Size
from gptoss_ft.kernels.reference import LayerWeights, MXFP4Weight

P = ParamSpec("P")
R = TypeVar("R")

REFERENCE = "torch"
# In place of an implementation's name where no implementation is for a device.
NO_KERNEL = "kernels"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Implementation(Generic[P, R]):
    """One way to compute an operation on devices of one type, in the signature of its reference.

    Args:
        unavailable: why it cannot run on a device in a dtype, whatever the tensors; empty if it can.
        refusal: why it cannot take these tensors in particular, from the arguments of `function`; empty if it can.
        check_sizes: together they lead through each of its code paths.
        check_in: contexts in each of which all sizes are checked, for code paths that a setting chooses: a verdict is
            kept for runs with other settings.
        poisoned: check it a second time in fresh memory that holds NaN. Not for what torch.compile compiles: it takes
            memory by itself, and would be compiled again.
    """

    name: str
    function: Callable[P, R]
    device_type: str
    unavailable: Callable[[torch.device, torch.dtype], str]
    refusal: Callable[..., str]
    check_sizes: tuple[Size, ...] = (AWKWARD,)
    check_in: tuple[Callable[[], AbstractContextManager[None]], ...] = (nullcontext,)
    poisoned: bool = True


class Refused(NamedTuple):
    """An implementation that does not run, and why: it cannot, or it `failed` its self-check."""

    implementation: str
    reason: str
    failed: bool = False


class Choice(NamedTuple, Generic[P, R]):
    """What runs, and why each faster implementation for the device does not."""

    implementation: str
    function: Callable[P, R]
    device: torch.device
    dtype: torch.dtype
    refused: tuple[Refused, ...]


# Why all kernels for a device are out of use in a dtype, as far as it was told: it is no news from the next operation.
_told_for_all: set[tuple[Refused, ...]] = set()


class Operands(NamedTuple):
    """What the choice of an implementation needs to know about the arguments of every operation."""

    device: torch.device
    dtype: torch.dtype
    same_device: bool
    requires_grad: bool


class Operation(Generic[P, R]):
    """A function of `reference`, called like it, that runs in its fastest usable implementation.

    Args:
        reference: the truth in plain torch, which takes every device and dtype and runs where nothing else can.
        implementations: fastest first.
        case: operands for the self-check and the measurement of speed.
        dtypes: what it computes in during training, for `gptoss-ft doctor`.
        exact: implementations must give the bits of the reference.
        differentiable: autograd goes through the reference and all implementations, and the check includes gradients.
        torch_on: types of devices on which plain torch is the vendor's kernel, so that no other one is missed.
    """

    def __init__(
        self,
        reference: Callable[P, R],
        implementations: tuple[Implementation[P, R], ...],
        case: Case,
        *,
        dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32),
        exact: bool = False,
        differentiable: bool = False,
        torch_on: Collection[str] = (),
    ) -> None:
        self.reference, self.implementations, self.case, self.dtypes = reference, implementations, case, dtypes
        self.exact, self.differentiable, self.torch_on = exact, differentiable, torch_on
        self.name = self.__name__ = reference.__name__
        self.__doc__ = reference.__doc__
        self._told: set[Choice[P, R]] = set()

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.chosen(*args, **kwargs).function(*args, **kwargs)

    def chosen(self, *args: P.args, **kwargs: P.kwargs) -> Choice[P, R]:
        """`choose`, and log once why nothing faster runs."""
        choice = self.choose(*args, **kwargs)
        if choice.refused and choice not in self._told:
            self._told.add(choice)
            log.log(*self._message(choice))
        return choice

    def choose(self, *args: P.args, **kwargs: P.kwargs) -> Choice[P, R]:
        """What runs for these arguments; an implementation that was never checked on their device is checked now."""
        device, dtype, same_device, requires_grad = operands_of(*args, **kwargs)
        name, function, refused = REFERENCE, self.reference, []
        for implementation in self.implementations:
            if implementation.device_type != device.type:
                continue
            failed = False
            if not same_device:
                reason = "operands are on different devices"
            elif requires_grad and not self.differentiable and torch.is_grad_enabled():
                reason = "autograd is recording, and its results would have no gradient"
            else:
                reason = implementation.unavailable(device, dtype) or implementation.refusal(*args, **kwargs)
                if not reason:
                    verdict = self.verdict(implementation, device, dtype)
                    if verdict.passed:
                        name, function = implementation.name, implementation.function
                        break
                    reason, failed = verdict.reason, True
            refused.append(Refused(implementation.name, reason, failed))
        if name == REFERENCE and not refused and device.type not in self.torch_on:
            refused.append(Refused(NO_KERNEL, f"there is none for {device.type} yet"))
        return Choice(name, function, device, dtype, tuple(refused))

    def verdict(
        self, implementation: Implementation[P, R], device: torch.device, dtype: torch.dtype
    ) -> selfcheck.Verdict:
        """The self-check of an implementation on a device: remembered, in a file of an earlier process, or made now."""
        key = verdicts.Key(self.name, implementation.name, device, dtype)
        return verdicts.remembered(key) or verdicts.remember(key, self._check(implementation, device, dtype))

    def _check(
        self, implementation: Implementation[P, R], device: torch.device, dtype: torch.dtype
    ) -> selfcheck.Verdict:
        found = []
        # Autograd keeps no tensor made in inference mode, and checkpointing would recompute its layer in this check.
        own = torch.autograd.graph.saved_tensors_hooks(Tensor.detach, Tensor.detach)
        with torch.inference_mode(False), own:
            for size, setting in product(implementation.check_sizes, implementation.check_in):
                call = self.case.call(Draw(device, dtype), size)
                if reason := implementation.refusal(*call.args, **call.kwargs):
                    fault = f"it refuses the operands to be checked on: {reason}"
                    return selfcheck.Verdict(math.nan, math.nan, fault)
                with setting():
                    verdict = selfcheck.measure(
                        implementation.function,
                        self.reference,
                        call,
                        exact=self.exact,
                        differentiable=self.differentiable,
                        poisoned=implementation.poisoned,
                    )
                found.append(verdict)
        return selfcheck.worst(found)

    def _message(self, choice: Choice[P, R]) -> tuple[int, str]:
        """A logging level and one line of what runs instead of what."""
        slow = choice.implementation == REFERENCE
        failed = any(refused.failed for refused in choice.refused)
        compared = any(made.device_type == choice.device.type for made in self.implementations)
        runs = f"plain torch{', which is slower' if compared else ''}" if slow else choice.implementation
        line = f"{self.name} in {short(choice.dtype)} on {choice.device} runs in {runs}; {reasons(choice.refused)}"
        if slow and self._none_is_available(choice):
            first = choice.refused not in _told_for_all
            _told_for_all.add(choice.refused)
            level = logging.WARNING if first else logging.INFO
            return level, f"{line} (`gptoss-ft doctor` lists every operation that this holds for)"
        # A processor without the newest instructions is no news; plain torch and wrong results are.
        return logging.WARNING if slow or failed else logging.INFO, line

    def _none_is_available(self, choice: Choice[P, R]) -> bool:
        """Whether there is no kernel for the device, or each lacks something there, whatever the tensors."""
        lacks = {made.name: made.unavailable(choice.device, choice.dtype) for made in self.implementations}
        return all(name == NO_KERNEL or lacks.get(name) == reason for name, reason, _ in choice.refused)


def operands_of(*args: object, **kwargs: object) -> Operands:
    """`Operands`, with the device of the first tensor and the dtype asked for, or else of the first float tensor.

    Raises:
        TypeError: if no argument is a tensor, or none has a floating dtype.
    """
    device = asked = found = None
    same_device, requires_grad = True, False
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            tensors: tuple[Tensor, ...] = (value,)
        elif isinstance(value, MXFP4Weight):
            tensors = value
        elif isinstance(value, LayerWeights):
            tensors = value.tensors()
        else:
            if isinstance(value, torch.dtype):
                asked = value
            continue
        for tensor in tensors:
            device = device or tensor.device
            same_device = same_device and tensor.device == device
            requires_grad = requires_grad or tensor.requires_grad
            if found is None and tensor.is_floating_point():
                found = tensor.dtype
    dtype = asked or found
    if device is None or dtype is None:
        raise TypeError("no argument is a tensor, or none has a floating dtype")
    return Operands(device, dtype, same_device, requires_grad)


def reasons(refused: tuple[Refused, ...]) -> str:
    """`a and b: reason`, once for each different reason."""
    names: dict[str, list[str]] = {}
    for implementation, reason, _ in refused:
        names.setdefault(reason, []).append(implementation)
    return "; ".join(f"{' and '.join(of)}: {reason}" for reason, of in names.items())


def short(dtype: torch.dtype) -> str:
    """`bf16` for `torch.bfloat16` and the like."""
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}.get(dtype, str(dtype).removeprefix("torch."))
