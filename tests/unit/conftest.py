"""What tests of kernels share."""

import pytest
import torch
from torch import Tensor

from gptoss_ft.kernels import cpu_library


@pytest.fixture(params=cpu_library.ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every instruction set of the CPU library that this processor has, in turn."""
    if cpu_library.library() is None:
        pytest.skip("the CPU library was not built: no C++ compiler")
    if request.param not in cpu_library.supported_isas():
        pytest.skip(f"this processor has no {request.param}")
    monkeypatch.setenv(cpu_library.ISA_VARIABLE, request.param)
    return request.param


@pytest.fixture
def poisoned_memory():
    """Fresh tensors hold NaN, so an element that no kernel writes shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.zeros(1).new_empty(4, 8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def assert_as_exact_as_torch():
    """Errors against fp64 `truth` at most twice those of `plain` torch in the same dtype."""

    def check(ours: Tensor, plain: Tensor, truth: Tensor, name: str = "") -> None:
        assert ours.shape == plain.shape == truth.shape and ours.dtype == plain.dtype
        if truth.numel() == 0:
            return
        error, budget = ((t.double() - truth).abs().max() for t in (ours, plain))
        # fp32 torch adds up in more partial sums than there are registers here, and at these sizes hardly errs at all.
        floor = truth.abs().max() * 2**-20
        assert error <= max(2 * budget, floor), f"{name} {error:.2e} > 2 x {budget:.2e}"

    return check


@pytest.fixture
def with_threads():
    """Calls a function with several numbers of threads and returns the results."""
    before = torch.get_num_threads()

    def results(function):
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            yield function()

    yield lambda function: list(results(function))
    torch.set_num_threads(before)
