"""The quickstart's notebook runs, and is kept with the outputs of a run."""

import ast
import importlib.util
import json
import re
from pathlib import Path

import nbformat
import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "quickstart"
# Folders that only one machine has.
MACHINE_PATH = re.compile(
    r"(?<![\w.])/(?:root|home|work|tmp|usr|opt|mnt|content|Users|private|var)/|\b[A-Z]:\\\\?Users"
)


@pytest.fixture
def notebook():
    return nbformat.read(EXAMPLE / "quickstart.ipynb", as_version=4)


@pytest.fixture(scope="module")
def run_notebook():
    spec = importlib.util.spec_from_file_location("run_notebook", EXAMPLE / "run_notebook.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def outputs_of(notebook):
    """Text, or HTML where there is any, by cell id."""

    def text(output):
        return output.text if output.output_type == "stream" else output.data.get("text/html", "")

    return {cell.id: "".join(map(text, cell.get("outputs", []))) for cell in notebook.cells}


def check_outputs(outputs):
    """What every run has to show, however short."""
    assert "preset: quickstart" in outputs["install"]
    assert "arithmetic.jsonl, 200 rows" in outputs["rows"] and '"tool_calls"' in outputs["rows"]
    assert outputs["tokens"].count("&lt;|return|&gt;") == 1 and outputs["tokens"].count("&lt;|call|&gt;") == 1
    assert "+ | <|channel|>commentary to=functions." in outputs["terminal"]
    assert "trainable parameters" in outputs["train"] and "gradient audit: " in outputs["train"]
    before, after = map(float, re.search(r"held-out loss: ([\d.]+) -> ([\d.]+) nats", outputs["loss"]).groups())
    assert after < before and "<polyline" in outputs["loss"]
    assert outputs["ask"].count("trained:") == outputs["ask"].count("base:") == 2
    assert "vllm serve" in outputs["serve"]
    return before, after


def test_it_runs_at_reduced_size(notebook, run_notebook, tmp_path):
    done = run_notebook.run(notebook, tmp_path, RUN_DIR="runs/small", MAX_STEPS=3, FORMATS=["adapter"])
    outputs = outputs_of(done)
    check_outputs(outputs)
    run = tmp_path / "runs" / "small"
    assert json.loads((run / "summary.json").read_text())["steps"] == 3
    assert "PASSED  runs/small/export/adapter" in outputs["verify"]
    assert json.loads((run / "verify-adapter.json").read_text())["passed"]


def test_it_is_kept_with_the_outputs_of_a_whole_run(notebook):
    assert all(cell.outputs and cell.execution_count for cell in notebook.cells if is_shown(cell))
    outputs = outputs_of(notebook)
    before, after = check_outputs(outputs)
    assert after <= before * 2 / 3
    verdicts = re.findall(r"^(\w+)  runs/quickstart/export/(\w+)", outputs["verify"], re.MULTILINE)
    assert verdicts == [("PASSED", "adapter"), ("PASSED", "bf16"), ("PASSED", "mxfp4")]


def is_shown(cell):
    return cell.cell_type == "code" and "parameters" not in cell.metadata.get("tags", [])


def test_kept_outputs_are_of_no_machine_in_particular(notebook):
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            assert output.output_type in ("stream", "display_data"), f"{cell.id} has an {output.output_type}"
            assert output.get("name") != "stderr", f"{cell.id}: {output.get('text')}"
    for id_, text in outputs_of(notebook).items():
        assert not MACHINE_PATH.search(text), f"{id_}: {MACHINE_PATH.search(text)}"
        assert "\r" not in text and "\x1b" not in text, f"{id_}: control characters"


@pytest.mark.parametrize(
    ("gpu_gb", "has_bfloat16", "has_weights", "preset"),
    [
        (None, None, True, "quickstart"),
        (15.8, False, True, "quickstart"),
        (34.1, False, True, "quickstart"),
        (17.0, True, True, "attention_20b"),
        (23.7, True, True, "lora_20b"),
        (85.0, True, True, "lora_20b"),
        (85.0, True, False, "quickstart"),
    ],
)
def test_the_preset_fits_the_gpu(notebook, gpu_gb, has_bfloat16, has_weights, preset):
    (cell,) = [cell for cell in notebook.cells if cell.id == "install"]
    functions = [node for node in ast.parse(cell.source).body if getattr(node, "name", "") == "preset_for"]
    namespace = {"WEIGHTS": "gpt-oss-20b"}
    exec(compile(ast.Module(functions, []), "install", "exec"), namespace)
    found, reason = namespace["preset_for"](gpu_gb, has_bfloat16, has_weights)
    assert found == preset and reason


def test_portable_text_is_what_a_terminal_ends_up_showing(run_notebook):
    text = f"bar 1%\rbar 100%\r\n\x1b[31mred\x1b[0m {run_notebook.CHECKOUT}/rows.jsonl:1\r\n"
    assert run_notebook.portable(text) == "bar 100%\nred rows.jsonl:1\n"
