"""A tiny base with the real vocabulary and a few real rows, shared by the recipes' tests."""

import json
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

import gptoss_ft
from gptoss_ft.adapters.attach import Targets, attach_adapters
from gptoss_ft.adapters.save import save_adapter
from gptoss_ft.config.load import compose_train_config, to_yaml
from gptoss_ft.model.init import init_checkpoint
from gptoss_ft.model.load import load_base
from gptoss_ft.recipes import sft

QUICKSTART = Path(gptoss_ft.__file__).parent / "assets" / "quickstart"


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    return init_checkpoint("tiny", tmp_path_factory.mktemp("base") / "tiny", progress=False)


@pytest.fixture(scope="session")
def four_rows(tmp_path_factory):
    """Two tool calls and two answers with reasoning: the shortest of the vendored rows."""
    rows = []
    for name in ("function_calls", "arithmetic"):
        lines = (QUICKSTART / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        single = [line for line in lines if len(json.loads(line)["messages"][-1].get("tool_calls", [0])) == 1]
        rows += sorted(single, key=len)[:2]
    path = tmp_path_factory.mktemp("rows") / "four.jsonl"
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def make_run(small_spec, small_bases):
    """`make_run(folder)` makes it a run folder as training leaves it, with an adapter that changes its base."""

    def make(folder):
        base = small_bases["mxfp4"]
        sizes = {"num_layers": small_spec.num_hidden_layers, "num_experts": small_spec.num_local_experts}
        model, _ = attach_adapters(load_base(base), Targets.parse(["all"], **sizes), r=2, alpha=4)
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        save_adapter(model, folder / "adapter")
        words = [f"run.dir={folder}", f"model.path={base}", f"data.path={folder.parent / 'rows.jsonl'}"]
        (folder / "config.yaml").write_text(to_yaml(compose_train_config(words)))
        return folder

    return make


@pytest.fixture
def run(make_run, tmp_path):
    return make_run(tmp_path / "run")


class StopAfter(TrainerCallback):
    """Ends training in the middle, as a crash would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture
def stopping_after(monkeypatch):
    """`with stopping_after(step):` training is interrupted at the end of that step."""

    @contextmanager
    def stopping(step):
        make_trainer = sft.make_trainer

        def interrupted(*args):
            trainer = make_trainer(*args)
            trainer.add_callback(StopAfter(step))
            return trainer

        with monkeypatch.context() as patched:
            patched.setattr(sft, "make_trainer", interrupted)
            yield

    return stopping
