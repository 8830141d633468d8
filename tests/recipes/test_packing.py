"""`data.packing=true`: fewer rows, the same steps."""

import json

import pytest

from gptoss_ft.cli import main


def train(run, base, rows, *more):
    words = [
        "config=quickstart",
        f"run.dir={run}",
        f"model.path={base}",
        f"data.path={rows}",
        f"data.eval_path={rows}",
        "data.eval_fraction=0",
        "data.max_length=200",
        "data.analysis_weight=0.5",
        "adapter.r=4",
        "trainer.warmup_steps=0",
        "trainer.max_steps=2",
        "trainer.gradient_accumulation_steps=1",
        # For the steps to agree closely: bf16 rounds each arrangement differently.
        "model.dtype=float32",
        "export.formats=[]",
    ]
    assert main(["train", *words, *more]) == 0
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Two answers, and two calls of one conversation, which share all of the first's tokens."""
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
    question, answer = {"role": "user", "content": "1 + 2?"}, {"role": "assistant", "content": "3", "thinking": "Easy."}
    conversations = [
        [question, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "3"}, answer],
        [question, answer],
        [{"role": "user", "content": "One and two?"}, answer],
    ]
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in conversations))
    return path


def test_a_packed_run_takes_the_steps_of_an_unpacked_one(tiny_base, rows, tmp_path, capsys):
    """All samples are in every step either way, so that nothing but their arrangement differs."""
    runs = {
        "plain": ["trainer.per_device_train_batch_size=4"],
        "packed": ["data.packing=true", "trainer.per_device_train_batch_size=2"],
        "shared": ["data.packing=true", "data.share_prefixes=true", "trainer.per_device_train_batch_size=2"],
    }
    runs["eager"] = [*runs["shared"], "model.attn_implementation=eager"]
    metrics = {name: train(tmp_path / name, tiny_base, rows, *words) for name, words in runs.items()}
    printed = capsys.readouterr().out
    assert "4 samples of 338 tokens packed as 338 into 2 rows" in printed
    assert "4 samples of 338 tokens packed as 256 into 2 rows" in printed
    for name in ("loss_nats", "eval_loss_nats", "eval_tokens"):
        expected = [line[name] for line in metrics["plain"] if name in line]
        assert len(expected) >= 2
        for run in ("packed", "shared", "eager"):
            assert [line[name] for line in metrics[run] if name in line] == pytest.approx(expected, rel=1e-4)
