"""The streaming safetensors writer against safetensors' own reader."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from gptoss_ft.model.shards import INDEX_FILE, write_shards
from gptoss_ft.model.spec import TensorSpec


def entries(tensors):
    """Entries whose producers give one row at a time."""
    return [
        (name, TensorSpec(tensor.dtype, tuple(tensor.shape)), lambda t=tensor: iter(t))
        for name, tensor in tensors.items()
    ]


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "b.odd": torch.randint(0, 256, (5, 7), dtype=torch.uint8, generator=generator),
        "a.large": torch.randn(8, 64, generator=generator).bfloat16(),
        "c.sinks": torch.randn(4, 1, generator=generator).bfloat16(),
        "d.codes": torch.randint(0, 256, (16, 64), dtype=torch.uint8, generator=generator),
    }


def test_one_file_reads_back(tmp_path, tensors):
    assert write_shards(tmp_path, entries(tensors)) == [tmp_path / "model.safetensors"]
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_whole_tensors_are_aligned_to_64_bytes(tmp_path, tensors):
    write_shards(tmp_path, entries(tensors))
    data = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    starts = {name: 8 + length + header[name]["data_offsets"][0] for name in tensors}
    assert starts["a.large"] % 64 == starts["d.codes"] % 64 == 0


def test_shards_are_indexed_in_the_published_form(tmp_path, tensors):
    files = write_shards(tmp_path, entries(tensors), max_shard_bytes=1100)
    assert [file.name for file in files] == [
        "model-00000-of-00001.safetensors",
        "model-00001-of-00001.safetensors",
    ]
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
    assert list(index["weight_map"]) == sorted(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(load_file(tmp_path / index["weight_map"][name])[name], tensor)


def test_a_producer_that_gives_too_little_is_an_error(tmp_path):
    short = ("x", TensorSpec(torch.uint8, (4,)), lambda: [b"abc"])
    with pytest.raises(RuntimeError, match="producer of x gave 3 bytes"):
        write_shards(tmp_path, [short])
