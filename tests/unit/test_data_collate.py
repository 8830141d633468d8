import torch

from gptoss_ft.data.collate import PaddingCollator

SAMPLES = [
    {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "row": "rows.jsonl:1"},
    {"input_ids": [4], "labels": [4], "row": "rows.jsonl:2"},
]


def test_pads_on_the_right_to_the_longest():
    batch = PaddingCollator()(SAMPLES)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[1, 2, 3], [4, 199999, 199999]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[-100, 2, 3], [4, -100, -100]],
    }
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_pads_with_the_models_own_token():
    assert PaddingCollator(pad_token_id=0)(SAMPLES)["input_ids"].tolist() == [[1, 2, 3], [4, 0, 0]]
