"""A CPU library that was built from other sources than those beside it is not called."""

import logging
import shutil

import pytest
import torch

from gptoss_ft.kernels import cpu_library, dispatch, reference, registry
from gptoss_ft.kernels.cases import AWKWARD, GROUPED_LINEAR, Draw
from gptoss_ft.recipes.doctor import machine_facts

has_sources = pytest.mark.skipif(not cpu_library.SOURCES.is_dir(), reason="installed without sources")
STALE = "built from other sources than those in"


@pytest.fixture(autouse=True)
def nothing_loaded(monkeypatch):
    """Whether there is a library is found out anew, before and after."""
    monkeypatch.delenv(cpu_library.ISA_VARIABLE, raising=False)
    caches = (cpu_library.fault, cpu_library.library)
    [found.cache_clear() for found in caches]
    yield
    [found.cache_clear() for found in caches]


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A copy of the sources, taken for those beside the library."""
    if cpu_library.library_file() is None:
        pytest.skip("the CPU library was not built")
    copy = shutil.copytree(cpu_library.SOURCES, tmp_path / "checkout" / "kernels" / "cpu")
    monkeypatch.setattr(cpu_library, "SOURCES", copy)
    return copy


def test_the_tests_run_on_a_library_of_these_sources():
    """Else they would be skipped, one by one."""
    assert cpu_library.fault() in ("", cpu_library.NOT_BUILT)


@has_sources
def test_the_same_sources_elsewhere_are_no_others(sources):
    (sources / "notes.txt").write_text("nothing that is compiled")
    assert cpu_library.fault() == "" and cpu_library.library() is not None


def edit(folder):
    header = folder / "grouped.h"
    header.write_text(header.read_text() + "\n")


def add(folder):
    (folder / "more.cpp").touch()


def remove(folder):
    (folder / "CMakeLists.txt").unlink()


def rename(folder):
    (folder / "grouped.h").rename(folder / "groups.h")


@has_sources
@pytest.mark.parametrize("change", [edit, add, remove, rename])
def test_other_sources_are_said_with_the_cure(sources, change):
    change(sources)
    assert cpu_library.library() is None
    assert cpu_library.fault().endswith(f"{STALE} {sources}: run `pip install -e {sources.parents[1]}` again")
    with pytest.raises(RuntimeError, match=STALE):
        cpu_library.function("of a name that was never asked for")


@has_sources
def test_a_library_too_old_to_say_what_it_was_built_from_is_not_called(sources, monkeypatch):
    monkeypatch.setattr(cpu_library, "library_file", lambda: torch._C.__file__)
    assert STALE in cpu_library.fault()


@has_sources
def test_the_reference_runs_with_one_warning_and_the_doctor_tells(sources, monkeypatch, caplog):
    edit(sources)
    monkeypatch.setattr(dispatch.grouped_linear, "_told", set())
    monkeypatch.setattr(registry, "_told_for_all", set())
    operands = GROUPED_LINEAR.call(Draw(torch.device("cpu"), torch.bfloat16), AWKWARD).args
    with caplog.at_level(logging.INFO):
        results = [dispatch.grouped_linear(*operands) for _ in range(2)]
    assert all(torch.equal(result, reference.grouped_linear(*operands)) for result in results)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert f"cpu/avx512bf16 and cpu/avx2 and cpu/portable: the CPU library was {STALE} {sources}" in record.message
    facts = dict(machine_facts())
    assert facts["cpu library"].startswith(f"{STALE} {sources}") and "instructions" not in facts


def test_a_wheel_has_nothing_to_compare_with(tmp_path, monkeypatch):
    before = cpu_library.fault()
    cpu_library.fault.cache_clear()
    monkeypatch.setattr(cpu_library, "SOURCES", tmp_path / "none")
    assert cpu_library.fault() == before
