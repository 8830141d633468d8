"""`gptoss-ft doctor`: the table, its notes, its exit code, and the same in JSON."""

import json
import math
from dataclasses import replace

import pytest
import torch

from gptoss_ft.cli import main
from gptoss_ft.kernels import cpu_library, dispatch, selfcheck, verdicts
from gptoss_ft.kernels.cases import Size
from gptoss_ft.kernels.registry import short
from gptoss_ft.recipes import doctor

built = pytest.mark.skipif(cpu_library.library() is None, reason="the CPU library was not built: no C++ compiler")


@pytest.fixture(autouse=True)
def small_and_fresh(tmp_path, monkeypatch):
    """Shapes that plain torch multiplies in a moment, one call of each, and no cache but the test's."""
    monkeypatch.setattr(doctor, "GPT_OSS_20B_CPU", Size(rows_E=(2, 3), inputs=64, outputs=32))
    monkeypatch.setattr(doctor, "MEASURE_SECONDS", 0.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(cpu_library.ISA_VARIABLE, raising=False)
    monkeypatch.setattr(verdicts, "_verdicts", {})


@pytest.fixture
def wrong(monkeypatch):
    """The best implementation of grouped_linear is wrong by 3 %; yields its name."""
    operation = dispatch.grouped_linear
    name = f"cpu/{cpu_library.selected_isa()}"

    def break_it(made):
        if made.name != name:
            return made
        return replace(made, function=lambda *operands: 1.03 * made.function(*operands))

    monkeypatch.setattr(operation, "implementations", tuple(map(break_it, operation.implementations)))
    return name


def table(text):
    """The rows under the header, as lists of words."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("operation "))
    rows = lines[start + 1 :]
    return [line.split() for line in rows[: rows.index("")]]


@built
def test_every_operation_is_checked_and_timed(capsys, tmp_path):
    out = tmp_path / "new" / "report.json"
    assert main(["doctor", "device=cpu", f"out={out}"]) == 0
    text, bar = capsys.readouterr()
    best = f"cpu/{cpu_library.selected_isa()}"
    expected = [[op.name, "cpu", short(dtype), best] for op in dispatch.OPERATIONS for dtype in op.dtypes]
    assert [row[:4] for row in table(text)] == expected
    for _, _, _, _, error, allowed, speed, unit, *_ in table(text):
        assert float(error) <= float(allowed)
        assert float(speed.replace(",", "")) >= 0 and unit in ("GFLOP/s", "GB/s")
    for isa in set(cpu_library.ISAS) - set(cpu_library.supported_isas()):
        assert f"cpu/{isa}: {cpu_library.MISSING[isa]}" in text
    assert f"torch         {torch.__version__}\n" in text
    assert f"{best.removeprefix('cpu/')} is used" in text
    assert text.endswith("\nEvery kernel that runs is right.\n")
    assert "grouped_linear on cpu in bf16" in bar

    report = json.loads(out.read_text())
    assert [row["operation"] for row in report["rows"]] == [row[0] for row in table(text)]
    assert report["machine"]["cpu"].startswith(verdicts.cpu_name())
    assert all(row["speed"] > 0 and row["error"] <= row["allowed"] for row in report["rows"])


@built
def test_a_wrong_kernel_fails_and_is_named_with_what_takes_over(wrong, capsys):
    assert main(["doctor", "device=cpu"]) == 1
    text = capsys.readouterr().out
    rows = {tuple(row[:3]): row for row in table(text)}
    for operation in ("grouped_linear", "grouped_linear_dx"):
        for dtype in ("bf16", "fp32"):
            assert (rows[operation, "cpu", dtype][3] == wrong) == (operation != "grouped_linear")
    notes = [line.split(" ", 2) for line in text.splitlines() if "failed its self-check (error" in line]
    assert {name for _, name, _ in notes} == {f"{wrong}:"}
    for (number, *_), dtype in zip(notes, ("bf16", "fp32"), strict=True):
        assert number in rows["grouped_linear", "cpu", dtype]
    assert "\nFAILED: grouped_linear in bf16 on cpu, grouped_linear in fp32 on cpu." in text


@built
def test_what_an_earlier_process_found_is_not_believed(monkeypatch, request):
    for dtype in (torch.bfloat16, torch.float32):
        key = verdicts.Key("grouped_linear", f"cpu/{cpu_library.selected_isa()}", torch.device("cpu"), dtype)
        verdicts.remember(key, selfcheck.Verdict(0.0, 1.0))
    request.getfixturevalue("wrong")
    assert main(["doctor", "device=cpu"]) == 1


def test_without_the_library_it_says_what_that_means_and_the_cure(monkeypatch, capsys):
    monkeypatch.setattr(cpu_library, "fault", lambda: cpu_library.NOT_BUILT)
    assert main(["doctor", "device=cpu"]) == 0
    text = capsys.readouterr().out
    assert "cpu library   not built: install gptoss-ft again where g++ or clang is found\n" in text
    assert {row[3] for row in table(text)} == {"torch"}
    assert {row[5] for row in table(text)} == {"-"}
    assert {row[-1] for row in table(text)} == {"[1]"}
    assert "[1] cpu/avx512bf16, cpu/avx2, cpu/portable: the CPU library was not built" in text
    assert text.endswith("but on cpu some or all of it is slow plain torch.\n")
    assert all(math.isfinite(float(row[4])) for row in table(text))


@built
def test_a_forced_instruction_set_is_said(monkeypatch, capsys):
    monkeypatch.setenv(cpu_library.ISA_VARIABLE, "portable")
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "portable (GPTOSS_FT_CPU_ISA forces it) is used" in text
    assert {row[3] for row in table(text) if row[1] == "cpu"} == {"cpu/portable"}


@built
def test_bad_words_are_one_line_and_measure_nothing(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(doctor, "examine_operation", pytest.fail)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    (tmp_path / "file").write_text("")
    assert main(["doctor", "device=tpu"]) == 2
    assert main(["doctor", "device=cuda:1"]) == 1
    assert main(["doctor", f"out={tmp_path / 'file' / 'report.json'}"]) == 1
    assert main(["doctor", f"out={tmp_path}"]) == 1
    monkeypatch.setenv(cpu_library.ISA_VARIABLE, "avx1024")
    assert main(["doctor"]) == 1
    text, errors = capsys.readouterr()
    assert text == ""
    for line, start in zip(
        errors.splitlines(),
        (
            "error: device must be cpu, cuda or cuda:N, got tpu",
            "error: device=cuda:1: torch sees these GPUs: none",
            f"error: {tmp_path / 'file'} cannot be written",
            f"error: out={tmp_path} is a folder",
            "error: GPTOSS_FT_CPU_ISA=avx1024: this processor runs portable",
        ),
        strict=True,
    ):
        assert line.startswith(start)


def test_a_device_is_chosen_among_those_there_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert list(map(str, doctor.devices_of(None))) == ["cpu", "cuda:0", "cuda:1"]
    assert list(map(str, doctor.devices_of("cuda"))) == ["cuda:0", "cuda:1"]
    assert list(map(str, doctor.devices_of("cuda:1"))) == ["cuda:1"]
    assert list(map(str, doctor.devices_of("cpu"))) == ["cpu"]
