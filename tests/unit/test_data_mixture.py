"""Weighted mixtures and the cache of compiled samples."""

import json
from collections import Counter

import pytest

from gptoss_ft.data import cache
from gptoss_ft.data.cache import cached
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
    mixed = mix(samples, [one, two, three], [0.5, 2.25, 0], seed=1)
    seen = Counter(sample.row for sample in mixed)
    assert sorted(seen[f"{one}:{line}"] for line in range(1, 11)) == [0] * 5 + [2] * 5  # two generations each
    assert sorted(seen[f"{two}:{line}"] for line in range(1, 5)) == [4, 4, 4, 6]
    assert not any(sample.row.startswith(str(three)) for sample in mixed)
    assert mix(samples, [one, two, three], [1, 1, 1], seed=1) == samples
    assert mix(samples, [one, two, three], [0.5, 2.25, 0], seed=1) == mixed
    assert any(mix(samples, [one, two, three], [0.5, 2.25, 0], seed) != mixed for seed in range(2, 7))


def test_unclear_and_empty_mixtures_are_errors(write, tmp_path):
    one = write("one.jsonl", 2)
    samples = compile_samples([one], max_length=512).samples
    with pytest.raises(UserError, match=r"one\.jsonl: belongs to two entries of data\.path"):
        mix(samples, [one, tmp_path / "*.jsonl"], [1, 2], seed=0)
    with pytest.raises(UserError, match="leave no sample"):
        mix(samples, [one], [0], seed=0)


def test_the_cache_gives_the_same_samples_until_anything_changes(write, tmp_path, monkeypatch):
    path, folder, compiled = write("rows.jsonl", 3), tmp_path / "cache", []

    def through_cache(settings="a", paths=(path,)):
        def compile():
            compiled.append(settings)
            return compile_samples(paths, max_length=512)

        return cached(folder, paths, settings, compile)

    first = through_cache()
    assert through_cache() == first and compiled == ["a"]
    through_cache("b")
    assert compiled == ["a", "b"]
    path.write_text(path.read_text() * 2)
    assert through_cache().rows == 6 and len(compiled) == 3
    monkeypatch.setattr(cache, "CODE", ("data",))
    through_cache()
    assert len(compiled) == 4
    assert all(file.suffix == ".arrow" for file in folder.iterdir())


def test_a_failure_leaves_the_cache_as_it_was(write, tmp_path):
    path = write("rows.jsonl", 1)
    with pytest.raises(UserError):
        cached(tmp_path / "cache", [path], 0, lambda: compile_samples([path], max_length=2))
    assert not (tmp_path / "cache").exists()


def test_hub_data_sets_are_not_kept(tmp_path):
    compiled = []
    for _ in range(2):
        cached(tmp_path / "cache", ["hf://a/b"], 0, lambda: compiled.append(1))
    assert compiled == [1, 1] and not (tmp_path / "cache").exists()
