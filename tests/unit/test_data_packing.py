import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptoss_ft.data.collate import PaddingCollator
from gptoss_ft.data.packing import best_fit
from gptoss_ft.data.prefix_tree import grow, plan_trees
from gptoss_ft.data.sample import Sample
from gptoss_ft.data.sample_table import SampleTable
from gptoss_ft.data.training_rows import PackedSamples, PackedTrees

CAPACITY = 40
lengths_of_samples = st.lists(st.integers(1, CAPACITY), max_size=60)


def by_definition(lengths):
    """Best-fit decreasing, looking at every row for every sample; the room of each row."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [place for place, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda place: rooms[place])] -= length
        else:
            rooms.append(CAPACITY - length)
    return rooms


@given(lengths_of_samples)
def test_each_sample_is_in_one_row_and_every_row_is_the_best_fit(lengths):
    packed = best_fit(lengths, CAPACITY)
    assert sorted(place for row in packed.rows for place in row) == list(range(len(lengths)))
    rooms = [CAPACITY - sum(lengths[place] for place in row) for row in packed.rows]
    assert sorted(rooms) == sorted(by_definition(lengths))
    assert (packed.tokens, packed.room) == (sum(lengths), CAPACITY * len(packed.rows))


def test_fills_what_can_be_filled():
    packed = best_fit([30, 25, 20, 15, 20, 10], CAPACITY)
    assert str(packed) == "packed as 120 into 3 rows, 100.0% full"
    assert packed == best_fit([30, 25, 20, 15, 20, 10], CAPACITY)


def test_a_sample_that_no_row_can_hold_is_refused():
    with pytest.raises(ValueError, match="sample 1 has 41 tokens and a row holds 40"):
        best_fit([3, 41], CAPACITY)


def sample(first, length, prompt):
    ids = list(range(first, first + length))
    return Sample(ids, [0.0] * prompt + [0.5] * (length - prompt), "rows.jsonl:1", 0)


def test_rows_hold_their_samples_end_to_end():
    samples = [sample(10, 3, 1), sample(20, 2, 0), sample(30, 4, 3)]
    dataset = PackedSamples(SampleTable.of(samples), [[2, 0], [1]])
    assert plain(dataset[0]) == {
        "input_ids": [30, 31, 32, 33, 10, 11, 12],
        "labels": [-100, -100, -100, 33, -100, 11, 12],
        "loss_weights": [0.0, 0.0, 0.0, 0.5, 0.0, 0.5, 0.5],
        "document_lengths": [4, 3],
    }
    # The first token of a sample is not predicted by whatever happens to precede it.
    second = plain(dataset[1])
    assert (second["labels"], second["loss_weights"]) == ([-100, 21], [0.0, 0.5])


def test_batches_say_where_documents_begin_and_padding_is():
    samples = SampleTable.of([sample(10, 3, 1), sample(20, 2, 1), sample(30, 4, 3)])
    dataset = PackedSamples(samples, [[2, 0], [1]])
    batch = {name: tensor.tolist() for name, tensor in PaddingCollator(pad_token_id=9)(list(dataset)).items()}
    assert batch["input_ids"] == [[30, 31, 32, 33, 10, 11, 12], [20, 21, 9, 9, 9, 9, 9]]
    assert batch["position_ids"] == [[0, 1, 2, 3, 0, 1, 2], [0, 1, 0, 0, 0, 0, 0]]
    assert batch["document_ids"] == [[0, 0, 0, 0, 1, 1, 1], [0, 0, -1, -1, -1, -1, -1]]
    assert batch["loss_weights"][1] == [0.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert batch["attention_mask"][1] == [1, 1, 0, 0, 0, 0, 0]


@given(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=10), min_size=1, max_size=8), st.integers(10, 40))
def test_every_branch_of_a_tree_is_a_sample(all_ids, capacity):
    samples = [Sample(ids, [1.0] * len(ids), "rows.jsonl:1", number) for number, ids in enumerate(all_ids)]
    table = SampleTable.of(samples)
    trees = [planted(table, plan) for plan in plan_trees(table, capacity)]
    assert all(len(tree) <= capacity for tree in trees)
    branches = []
    for tree in trees:
        for place, before in enumerate(tree.predicted_from):
            assert tree.position_ids[place] == (tree.position_ids[before] + 1 if before < place else 0)
        distinct = {tuple(branch(tree, place)) for place in range(len(tree))}
        assert len(distinct) == len(tree)  # no token twice
        branches += distinct
        for query in range(len(tree)):
            seen = [tree.input_ids[key] for key in range(query + 1) if query < tree.visible_until[key]]
            assert seen == branch(tree, query)
    assert set(branches) == {tuple(ids[:end]) for ids in all_ids for end in range(1, len(ids) + 1)}
    assert sum(sum(tree.loss_weights) for tree in trees) == sum(len(ids) - 1 for ids in all_ids)
    assert sum(tree.num_samples for tree in trees) == len(samples)


def planted(table, plan):
    """The tree of a plan, which has the size that was planned."""
    tree = grow(table[place] for place in plan.places)
    assert len(tree) == plan.size
    return tree


def plain(row):
    return {name: column.tolist() for name, column in row.items()}


def branch(tree, place):
    """The ids from the first token to this one."""
    before = tree.predicted_from[place]
    return [*(branch(tree, before) if before != place else []), tree.input_ids[place]]


def test_a_row_of_trees_counts_places_from_its_start():
    samples = [Sample([1, 2, 3], [0.0, 0.0, 1.0], "a:1", 0), Sample([1, 2, 4], [0.0, 1.0, 1.0], "a:1", 1)]
    table = SampleTable.of([*samples, Sample([5, 6], [1.0, 1.0], "a:2", 0)])
    (row,) = map(plain, PackedTrees(table, list(plan_trees(table, CAPACITY)), [[1, 0]]))
    assert row == {
        "input_ids": [5, 6, 1, 2, 3, 4],
        "labels": [-100, 6, -100, 2, 3, 4],
        "loss_weights": [0.0, 1.0, 0.0, 1.0, 1.0, 1.0],
        "document_lengths": [2, 4],
        "position_ids": [0, 1, 0, 1, 2, 2],
        "predicted_from": [0, 0, 2, 2, 3, 3],
        "visible_until": [2, 2, 6, 6, 5, 6],
    }
    other = {**row, "input_ids": [7], "labels": [-100], "loss_weights": [0.0], "document_lengths": [1]}
    other |= {"position_ids": [0], "predicted_from": [0], "visible_until": [1]}
    batch = PaddingCollator()([row, other])
    assert batch["position_ids"].tolist() == [row["position_ids"], [0] * 6]
    # Padding sees padding, and nothing else does.
    assert batch["document_ids"][1].tolist() == [0, -1, -1, -1, -1, -1]
    assert batch["visible_until"][1].tolist() == [1, 6, 6, 6, 6, 6]
