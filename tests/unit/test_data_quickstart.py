"""The rows that ship with the package."""

import importlib.metadata
import json
import runpy
import sys
from importlib.resources import files
from pathlib import Path

import pytest

from gptoss_ft.data.dataset import compile_samples
from gptoss_ft.harmony.vocabulary import decode

FOLDER = Path(str(files("gptoss_ft") / "assets" / "quickstart"))
BUILD_DATA = Path(__file__).parents[2] / "examples" / "quickstart" / "build_data.py"


def rows(name):
    return [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(("name", "generations"), [("function_calls.jsonl", 258), ("arithmetic.jsonl", 200)])
def test_every_row_compiles(name, generations):
    compiled = compile_samples([FOLDER / name], max_length=512)
    assert (compiled.rows, compiled.generations, len(compiled.samples)) == (200, generations, generations)


def test_calls_are_the_target():
    compiled = compile_samples([FOLDER / "function_calls.jsonl"], max_length=512)
    targets = [decode([token for token in sample.labels if token != -100]) for sample in compiled.samples]
    written = []
    for row in rows("function_calls.jsonl"):
        for call in row["messages"][-1]["tool_calls"]:
            name = call["function"]["name"].replace(".", "_")
            arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False, separators=(",", ":"))
            written.append(f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{arguments}<|call|>")
    assert targets == written


def test_worked_solutions_end_in_their_answers():
    for row in rows("arithmetic.jsonl"):
        answer = row["messages"][-1]
        assert answer["content"].isdigit() and answer["thinking"] and "####" not in answer["thinking"]


def test_build_data_rebuilds_them(monkeypatch, tmp_path):
    for package in ("bfcl-eval", "reasoning-gym"):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{package} is not installed")
    monkeypatch.setattr(sys, "argv", [str(BUILD_DATA), "--out", str(tmp_path)])
    runpy.run_path(str(BUILD_DATA), run_name="__main__")
    for built in tmp_path.iterdir():
        assert built.read_bytes() == (FOLDER / built.name).read_bytes()


def test_build_data_says_how_to_install_what_it_lacks(monkeypatch, tmp_path, capsys):
    def absent(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    monkeypatch.setattr(sys, "argv", [str(BUILD_DATA), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=r"(?s)bfcl-eval 2026\.3\.23 is needed, found none.*pip install --no-deps"):
        runpy.run_path(str(BUILD_DATA), run_name="__main__")
    assert not (tmp_path / "out").exists()
