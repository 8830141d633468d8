"""docs/serving.md: its export commands run, and its servers are given files and settings that these write."""

import re
import shlex
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from gptoss_ft.adapters.attach import Targets, attach_adapters
from gptoss_ft.adapters.save import save_adapter
from gptoss_ft.cli import main
from gptoss_ft.config.commands import ExportCommand
from gptoss_ft.config.load import compose_train_config, load_command, to_yaml
from gptoss_ft.config.values import ExportFormat
from gptoss_ft.export.vllm_adapter import MAX_LORA_RANKS
from gptoss_ft.model.load import load_base

TEXT = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", TEXT, flags=re.M | re.S))
SERVERS = ("vLLM", "SGLang", "llama.cpp", "Ollama", "transformers", "TensorRT-LLM")
EXPORT = re.compile(r"^    gptoss-ft export (.*)$", re.M)


@pytest.fixture(scope="module")
def run(small_spec, small_bases, tmp_path_factory):
    """A run folder as training leaves it."""
    folder = tmp_path_factory.mktemp("serving") / "run"
    base = small_bases["mxfp4"]
    targets = Targets.parse(["all"], num_layers=small_spec.num_hidden_layers, num_experts=small_spec.num_local_experts)
    model, _ = attach_adapters(load_base(base), targets, r=2, alpha=4)
    save_adapter(model, folder / "adapter")
    words = [f"run.dir={folder}", f"model.path={base}", f"data.path={folder / 'rows.jsonl'}"]
    (folder / "config.yaml").write_text(to_yaml(compose_train_config(words)))
    return folder


def test_every_server_and_format_is_described():
    assert set(SERVERS) <= SECTIONS.keys()
    table = re.findall(r"^\| `(\w+)` \|", TEXT, flags=re.M)
    assert sorted(table) == sorted(ExportFormat)


@pytest.mark.parametrize("section", SECTIONS)
def test_the_commands_of_a_section_write_what_its_server_is_given(run, tmp_path, monkeypatch, section):
    monkeypatch.chdir(tmp_path)
    written = set()
    for command in EXPORT.findall(SECTIONS[section]):
        words = [f"run={run}" if word.startswith("run=") else word for word in shlex.split(command)]
        cfg = load_command(ExportCommand, words)
        if "rounding=calibrated" not in words:
            assert main(["export", *words, "fidelity_tokens=0"]) == 0
            written.add(cfg.out)
    for other in re.findall(r"^    (?!gptoss-ft export)(.+)$", SECTIONS[section], flags=re.M):
        for name in re.findall(
            r"(?:\./|=|'|\"|\s|^)((?:merged|adapter)(?:-[\w]+)?(?:/\w+\.gguf)?)(?='|\"|\s|$)", other
        ):
            if section != "Ollama":
                assert name.partition("/")[0] in written, other
                assert (tmp_path / name).exists(), other
    for rank in re.findall(r"--max-lora-rank (\d+)", SECTIONS[section]):
        assert int(rank) in MAX_LORA_RANKS


def test_the_section_of_transformers_works(run, small_bases, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["export", f"run={run}", "format=adapter", "out=adapter"]) == 0
    code = re.search(r"    from peft .*\n(?:    .*\n|\n)+", SECTIONS["transformers"])[0]
    code = "\n".join(line.removeprefix("    ") for line in code.splitlines())
    assert "PeftModel" in code
    names: dict = {}
    exec(code.replace('"BASE"', repr(str(small_bases["mxfp4"]))), names)
    assert sum("lora_A" in name for name, _ in names["model"].named_parameters()) == 2 * 6
    assert main(["export", f"run={run}", "format=mxfp4", "out=merged-mxfp4", "fidelity_tokens=0"]) == 0
    AutoModelForCausalLM.from_pretrained("merged-mxfp4")
