"""Weighted mixtures."""

import json
from collections import Counter

import pytest

from gptoss_ft.data.dataset import compile_samples
from gptoss_ft.data.mixture import mix
from gptoss_ft.errors import UserError

TURN = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.fixture
def write(tmp_path):
    def write(name, num_rows):
        path = tmp_path / name
        path.write_text("".join(json.dumps({"messages": TURN * 2}) + "\n" for _ in range(num_rows)))
        return path

    return write


def test_rows_are_seen_as_often_as_their_weight_says(write):
    one, two, three = write("one.jsonl", 10), write("two.jsonl", 4), write("three.jsonl", 3)
    samples = compile_samples([one, two, three], max_length=512).samples
    mixed = list(mix(samples, [one, two, three], [0.5, 2.25, 0], seed=1))
    seen = Counter(sample.row for sample in mixed)
    assert sorted(seen[f"{one}:{line}"] for line in range(1, 11)) == [0] * 5 + [2] * 5  # two generations each
    assert sorted(seen[f"{two}:{line}"] for line in range(1, 5)) == [4, 4, 4, 6]
    assert not any(sample.row.startswith(str(three)) for sample in mixed)
    assert list(mix(samples, [one, two, three], [1, 1, 1], seed=1)) == list(samples)
    assert list(mix(samples, [one, two, three], [0.5, 2.25, 0], seed=1)) == mixed
    assert any(list(mix(samples, [one, two, three], [0.5, 2.25, 0], seed)) != mixed for seed in range(2, 7))


def test_unclear_and_empty_mixtures_are_errors(write, tmp_path):
    one = write("one.jsonl", 2)
    samples = compile_samples([one], max_length=512).samples
    with pytest.raises(UserError, match=r"one\.jsonl: belongs to two entries of data\.path"):
        mix(samples, [one, tmp_path / "*.jsonl"], [1, 2], seed=0)
    with pytest.raises(UserError, match="leave no sample"):
        mix(samples, [one], [0], seed=0)
