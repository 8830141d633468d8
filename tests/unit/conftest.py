"""For tests of the compiled CPU library."""

import pytest
import torch

from gptoss_ft.kernels import cpu_library


@pytest.fixture(params=cpu_library.ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
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
