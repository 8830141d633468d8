"""A tiny base with the real vocabulary and a few real rows, shared by the recipes' tests."""

import json
from pathlib import Path

import pytest

import gptoss_ft
from gptoss_ft.model.init import init_checkpoint

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
