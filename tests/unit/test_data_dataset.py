import json

import numpy as np
import pytest

from gptoss_ft.data.dataset import compile_samples, split_rows
from gptoss_ft.data.rows import RowSettings
from gptoss_ft.data.sample import Sample
from gptoss_ft.data.sample_table import SampleTable
from gptoss_ft.data.training_rows import SampleRows
from gptoss_ft.errors import ConfigError, UserError
from gptoss_ft.harmony.conversation import Conversation
from gptoss_ft.harmony.vocabulary import decode

LOW_EFFORT = Conversation((), reasoning_effort="low")
TWO_TURNS = [
    {"role": "user", "content": "q1"},
    {"role": "assistant", "thinking": "t1", "content": "a1"},
    {"role": "user", "content": "q2"},
    {"role": "assistant", "content": "a2"},
]


@pytest.fixture
def rows_file(tmp_path):
    def write(*rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


def test_one_sample_per_generation_with_labels_on_the_completion(rows_file):
    path = rows_file({"messages": TWO_TURNS}, {"messages": TWO_TURNS[2:]})
    compiled = compile_samples([path], max_length=512)
    assert [(sample.row, sample.generation) for sample in compiled.samples] == [
        (f"{path}:1", 0),
        (f"{path}:1", 1),
        (f"{path}:2", 0),
    ]
    for sample in compiled.samples:
        trained = [token for token in sample.labels if token != -100]
        assert len(sample.labels) == len(sample.input_ids)
        assert sample.input_ids[-len(trained) :] == sample.labels[-len(trained) :] == trained
        assert decode(sample.input_ids[: -len(trained)]).endswith("<|end|><|start|>assistant")
    first = compiled.samples[0]
    assert decode([token for token in first.labels if token != -100]) == (
        "<|channel|>analysis<|message|>t1<|end|><|start|>assistant<|channel|>final<|message|>a1<|return|>"
    )


def test_counts(rows_file):
    unweighted = [{**message, "weight": 0} if message["role"] == "assistant" else message for message in TWO_TURNS]
    long_question = [{"role": "user", "content": "word " * 500}, TWO_TURNS[1]]
    path = rows_file({"messages": TWO_TURNS}, {"messages": unweighted}, {"messages": long_question})
    other = rows_file({"messages": TWO_TURNS[2:]}, name="other.jsonl")
    compiled = compile_samples([path, other], max_length=200)
    assert (compiled.rows, compiled.rows_without_thinking, compiled.generations) == (4, 1, 6)
    assert (compiled.dropped_too_long, compiled.dropped_without_loss, len(compiled.samples)) == (1, 2, 3)
    assert str(compiled).startswith(
        "4 rows (1 without thinking), 6 generations; dropped 1 as too long and 2 without loss; kept 3 samples of"
    )
    assert compiled.tokens == sum(len(sample.input_ids) for sample in compiled.samples)
    assert compiled.loss_tokens == sum(token != -100 for sample in compiled.samples for token in sample.labels)


def test_default_effort_is_for_rows_without_one(rows_file):
    path = rows_file({"messages": TWO_TURNS[:2]}, {"messages": TWO_TURNS[:2], "reasoning_effort": "high"})
    compiled = compile_samples([path], rows=RowSettings(defaults=LOW_EFFORT), max_length=512)
    assert ["Reasoning: low" in decode(sample.input_ids) for sample in compiled.samples] == [True, False]


def test_errors_name_file_line_and_field(rows_file):
    path = rows_file({"messages": TWO_TURNS}, {"messages": [{"role": "robot"}]})
    with pytest.raises(UserError, match=r"rows\.jsonl:2: messages\[0\]\.role: 'robot' is not a role"):
        compile_samples([path], max_length=512)


def test_what_cannot_be_read_is_named_wherever_it_hides(rows_file):
    tool = {"name": "f", "parameters": '{"maximum": 1e999}'}
    path = rows_file({"messages": TWO_TURNS, "tools": [tool]})
    with pytest.raises(UserError, match=r"rows\.jsonl:1: tools\[0\]\.parameters: the number 1e999 is too large"):
        compile_samples([path], max_length=512)
    # Too deep for the parser or for what comes after it, by the version of Python.
    nested = '{"a":' * 3000 + "1" + "}" * 3000
    path.write_text(f'{{"messages": {json.dumps(TWO_TURNS)}, "tools": [{{"name": "f", "parameters": {nested}}}]}}')
    with pytest.raises(UserError, match=r"rows\.jsonl:1: lists and objects are nested too deeply"):
        compile_samples([path], max_length=512)


def test_nothing_left_is_an_error(rows_file):
    path = rows_file({"messages": TWO_TURNS})
    with pytest.raises(
        UserError, match=r"no sample is left of 1 rows .* 2 longer than 10 tokens \(the shortest has \d+\)"
    ):
        compile_samples([path], max_length=10)


def test_unknown_format(rows_file):
    with pytest.raises(ConfigError, match="'message' is not known; use one of auto, harmony, "):
        compile_samples([rows_file({"messages": TWO_TURNS})], rows=RowSettings(format="message"), max_length=512)


def test_split_keeps_a_rows_generations_together(rows_file):
    path = rows_file(*[{"messages": TWO_TURNS}] * 20)
    samples = compile_samples([path], max_length=512).samples
    train, held_out = map(list, split_rows(samples, 0.1, seed=3))
    assert (len(train), len(held_out)) == (36, 4)
    assert not {sample.row for sample in train} & {sample.row for sample in held_out}
    assert sorted(train + held_out, key=[*samples].index) == list(samples)
    assert [*map(list, split_rows(samples, 0.1, seed=3))] == [train, held_out]
    assert any(list(split_rows(samples, 0.1, seed)[1]) != held_out for seed in range(5))


def test_rows_on_one_line_are_rows_of_their_own(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([{"messages": TWO_TURNS}] * 4))
    (tmp_path / "row.json").write_text(json.dumps([{"messages": TWO_TURNS}]))
    paths = [tmp_path / name for name in ("rows.json", "row.json", "row.json")]
    samples = compile_samples(paths, max_length=512).samples
    assert np.diff(samples.row_numbers).tolist() == [0, 1] * 5 + [0]
    train, held_out = split_rows(samples, 0.5, seed=0)
    assert (len(train), len(held_out)) == (6, 6)


def test_split_never_empties_a_side():
    two_rows = SampleTable.of(Sample([1, 2], [0.0, 1.0], f"rows.jsonl:{line}", 0) for line in (1, 2))
    assert [len(side) for side in split_rows(two_rows, 0.01, seed=0)] == [1, 1]
    assert [len(side) for side in split_rows(two_rows, 0.99, seed=0)] == [1, 1]
    one_row = two_rows[:1]
    assert [*map(list, split_rows(one_row, 0, seed=0))] == [list(one_row), []]
    with pytest.raises(UserError, match="at least two rows"):
        split_rows(one_row, 0.1, seed=0)


def test_training_rows(rows_file):
    samples = compile_samples([rows_file({"messages": TWO_TURNS})], max_length=512).samples
    rows = list(SampleRows(samples))
    assert [{name: column.tolist() for name, column in row.items()} for row in rows] == [
        {name: getattr(sample, name) for name in ("input_ids", "labels", "loss_weights")} for sample in samples
    ]
    assert {name: column.dtype for name, column in rows[0].items()} == {
        "input_ids": np.int32,
        "labels": np.int32,
        "loss_weights": np.float32,
    }
