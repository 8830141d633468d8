import torch

from gptoss_ft.data.collate import PaddingCollator

SAMPLES = [
    {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "length": 3},
    {"input_ids": [4], "labels": [4], "length": 1},
]


def test_pads_on_the_right_to_the_longest():
    batch = PaddingCollator()(SAMPLES)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[1, 2, 3], [4, 199999, 199999]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[-100, 2, 3], [4, -100, -100]],
    }
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_pads_to_a_multiple():
    assert PaddingCollator(pad_to_multiple_of=8)(SAMPLES)["labels"].shape == (2, 8)
    assert PaddingCollator(pad_to_multiple_of=3)(SAMPLES)["labels"].shape == (2, 3)
    batch = PaddingCollator(pad_token_id=0, pad_to_multiple_of=4)(SAMPLES)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 0], [4, 0, 0, 0]]
