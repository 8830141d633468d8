"""What tests of kernels share."""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gptoss_ft.kernels import cpu_library


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The library with AVX-512 emulated, so that its paths are proven on processors without it."""
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if compiler is None or "avx2" not in cpu_library.supported_isas():
        pytest.skip("emulating AVX-512 takes a C++ compiler and a processor with AVX2")
    root, library = Path(__file__).parents[2], tmp_path_factory.mktemp("emulated") / cpu_library.LIBRARY_NAME
    sources = sorted((root / "kernels" / "cpu").glob("*.cpp"))
    # AVX2 for all functions: with and without it, they pass vectors of 32 bytes in different places.
    flags = ["-std=c++17", "-O1", "-w", "-mavx2", "-mfma", "-fPIC", "-shared", "-pthread", "-DGPTOSS_FT_X86"]
    flags += ['-DGPTOSS_FT_SOURCES="emulated"']
    flags += ["-ffp-contract=off"]  # which kernels/cpu/CMakeLists.txt sets for merge.cpp
    flags += ['-DAVX512_FEATURES="avx2,fma"', f"-I{root / 'tests' / 'emulation'}"]
    done = subprocess.run([compiler, *flags, *sources, "-o", library], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


@pytest.fixture(params=cpu_library.ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every instruction set of the CPU library in turn: those that this processor has, and AVX-512 emulated."""
    if cpu_library.library() is None:
        pytest.skip("the CPU library was not built: no C++ compiler")
    monkeypatch.setenv(cpu_library.ISA_VARIABLE, request.param)
    if request.param in cpu_library.supported_isas():
        yield request.param
    elif request.param != "avx512bf16":
        pytest.skip(f"this processor has no {request.param}")
    else:
        library = request.getfixturevalue("emulated")
        monkeypatch.setattr(cpu_library, "library", lambda: library)
        monkeypatch.setattr(cpu_library, "supported_isas", lambda: cpu_library.ISAS)
        cpu_library.function.cache_clear()
        yield request.param
        cpu_library.function.cache_clear()


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
