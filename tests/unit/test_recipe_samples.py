"""The data section's settings arrive in the samples, and its defaults are the renderer's own."""

import json

import pytest

from gptoss_ft.config.schema import DataConfig
from gptoss_ft.config.values import BuiltinTool, LossPolicy, MissingReasoning
from gptoss_ft.harmony.conversation import Conversation
from gptoss_ft.harmony.vocabulary import decode
from gptoss_ft.harmony.weights import LossRules
from gptoss_ft.recipes.samples import compile_rows, conversation_defaults, loss_rules


@pytest.fixture
def rows(tmp_path):
    question = {"role": "user", "content": "q"}
    reasoned = [question, {"role": "assistant", "thinking": "t", "content": "a"}]
    path = tmp_path / "rows.jsonl"
    lines = [{"messages": reasoned}, {"messages": [question, {"role": "assistant", "content": "b"}]}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_defaults_agree():
    cfg = DataConfig(path=["rows.jsonl"])
    assert conversation_defaults(cfg) == Conversation(messages=())
    assert loss_rules(cfg) == LossRules()


def test_system_message(rows):
    cfg = DataConfig(
        path=[str(rows)],
        identity="You are a parrot.",
        knowledge_cutoff=None,
        current_date="2025-06-28",
        builtin_tools=[BuiltinTool.python],
    )
    for sample in compile_rows(cfg.path, cfg).samples:
        assert decode(sample.input_ids).startswith(
            "<|start|>system<|message|>You are a parrot.\nCurrent date: 2025-06-28\n\n"
            "Reasoning: medium\n\n# Tools\n\n## python\n\nUse this tool to execute Python code"
        )


def test_loss(rows):
    cfg = DataConfig(
        path=[str(rows)],
        policy=LossPolicy.no_reasoning,
        final_weight=0.5,
        missing_reasoning=MissingReasoning.drop,
    )
    compiled = compile_rows(cfg.path, cfg)
    (sample,) = compiled.samples
    assert (compiled.generations, compiled.dropped_without_loss) == (2, 1)
    learned = [token for token, weight in zip(sample.input_ids, sample.loss_weights, strict=True) if weight == 0.5]
    assert decode(learned) == "<|start|>assistant<|channel|>final<|message|>a<|return|>"
    assert sample.num_loss_tokens == len(learned)


def test_kept_samples_are_those_of_the_settings_and_of_the_file(rows, tmp_path):
    def compiled(path, **settings):
        return compile_rows([path], DataConfig(path=[str(path)], **settings))

    changes = [
        {},
        {"max_length": 65},
        {"policy": LossPolicy.no_reasoning},
        {"final_weight": 0.5},
        {"missing_reasoning": MissingReasoning.low_effort},
        {"knowledge_cutoff": None},
        {"builtin_tools": [BuiltinTool.python]},
    ]
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(rows.read_bytes())
    seen = []
    for path, change in [(copy, {}), *((rows, change) for change in changes)]:
        fresh = compiled(path, **change, cache=False)
        for _ in range(2):
            kept = compiled(path, **change, cache_dir=str(tmp_path / "cache"))
            assert (list(kept.samples), str(kept)) == (list(fresh.samples), str(fresh))
        assert list(fresh.samples) not in seen
        seen.append(list(fresh.samples))
