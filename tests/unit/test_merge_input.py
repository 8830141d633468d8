"""Bases that cannot be merged into: the fault is named and nothing is written."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptoss_ft.errors import UserError
from gptoss_ft.export.deltas import LowRankDelta, weight_shapes
from gptoss_ft.export.merge import merge
from gptoss_ft.model.checkpoint import Checkpoint
from gptoss_ft.model.shards import INDEX_FILE, write_shards

GATE_UP, Q_PROJ = "model.layers.1.mlp.experts.gate_up_proj", "model.layers.0.self_attn.q_proj.weight"


def update(spec, name, expert=2):
    """Of one expert of a stack, or of a whole matrix."""
    *experts, rows, columns = weight_shapes(spec)[name]
    delta = LowRankDelta(torch.ones(*experts, 1, columns), torch.ones(*experts, rows, 1) * 0.01, 1.0)
    if experts:
        delta.B[[e for e in range(experts[0]) if e != expert]] = 0
    return {name: delta}


def changed(base, out, change):
    """A copy of a base with other tensors."""
    shutil.copytree(base, out)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return Checkpoint.open(out)


def refuses(base, deltas, tmp_path, format, message):
    with pytest.raises(UserError, match=message):
        merge(base, deltas, tmp_path / "out", format=format, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("format", ["mxfp4", "bf16", "original", "gguf"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_matrix_that_is_not_finite_is_named(small_spec, small_bases, tmp_path, format, bad):
    def change(tensors):
        tensors[Q_PROJ][5, 3] = bad

    base = changed(small_bases["mxfp4"], tmp_path / "base", change)
    message = f"base holds NaN or infinite numbers in {Q_PROJ}, rows 0 to .* download it again"
    refuses(base, update(small_spec, Q_PROJ), tmp_path, format, message)
    # What is copied is none of the merge's business; 8 bits are no copy.
    merge(base, update(small_spec, GATE_UP), tmp_path / "out", format=format, progress=False)
    shutil.rmtree(tmp_path / "out")
    refuses(base, {}, tmp_path, "gguf_q8_0", message)


def test_an_expert_that_is_not_finite_is_named(small_spec, small_bases, tmp_path):
    def change(tensors):
        tensors[f"{GATE_UP}_scales"][2, 7, 1] = 255

    base = changed(small_bases["mxfp4"], tmp_path / "base", change)
    refuses(base, update(small_spec, GATE_UP), tmp_path, "mxfp4", f"{GATE_UP}, expert 2: it is damaged")
    merge(base, update(small_spec, GATE_UP, expert=1), tmp_path / "out", format="mxfp4", progress=False)


def test_dense_experts_are_looked_at_where_they_are_rounded(small_spec, small_bases, tmp_path):
    def change(tensors):
        tensors[GATE_UP][3, 0, 0] = float("-inf")

    base = changed(small_bases["bf16"], tmp_path / "base", change)
    for format in ("mxfp4", "gguf"):
        refuses(base, {}, tmp_path, format, f"{GATE_UP}, expert 3: it is damaged")
    merge(base, {}, tmp_path / "out", format="bf16", progress=False)


@pytest.fixture
def sharded(small_bases, tmp_path):
    base, out = Checkpoint.open(small_bases["mxfp4"]), tmp_path / "base"
    out.mkdir()
    shutil.copyfile(base.path / "config.json", out / "config.json")
    entries = [(name, tensor, lambda name=name: base.copy(name)) for name, tensor in base.tensor_specs().items()]
    assert len(write_shards(out, entries, max_shard_bytes=1e5)) > 2
    return out


def test_an_index_that_names_what_is_not_there_is_refused(sharded):
    assert Checkpoint.open(sharded).nbytes()
    index = json.loads((sharded / INDEX_FILE).read_text())
    file = index["weight_map"][Q_PROJ]

    def check(change, message):
        other = {**index, "weight_map": {**index["weight_map"], **change}}
        (sharded / INDEX_FILE).write_text(json.dumps(other))
        with pytest.raises(UserError, match=message):
            Checkpoint.open(sharded)

    check({"model.extra.weight": file}, rf"says that model\.extra\.weight is in {file}, but it is in none of the files")
    elsewhere = next(other for other in index["weight_map"].values() if other != file)
    check({Q_PROJ: elsewhere}, f"says that {Q_PROJ} is in {elsewhere}, but it is in {file}: .* different checkpoints")
    check({Q_PROJ: "model-00099.safetensors"}, "files that model.safetensors.index.json names are absent")
    check({Q_PROJ: 3}, "has no weight_map")
