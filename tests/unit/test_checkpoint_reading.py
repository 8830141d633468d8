"""Opening checkpoints: the three layouts hold one model, tensors are mapped, and damage is named before it is read."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptoss_ft.errors import UserError
from gptoss_ft.kernels.reference import dequantize_mxfp4
from gptoss_ft.model.checkpoint import Checkpoint
from gptoss_ft.model.init import init_checkpoint, random_tensors
from gptoss_ft.model.shards import write_shards
from gptoss_ft.model.spec import SPECS

# The original config has no special ids; in a vocabulary this small both are read as its last.
SPEC = replace(SPECS["tiny"], vocab_size=96, num_hidden_layers=2, eos_token_id=95, pad_token_id=95)
LAYOUTS = ("mxfp4", "bf16", "original")
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    return {layout: init_checkpoint(SPEC, root / layout, layout=layout, progress=False) for layout in LAYOUTS}


@pytest.fixture
def copied(folders, tmp_path):
    """A function that copies a checkpoint for a test to damage."""

    def copy(layout="mxfp4"):
        return shutil.copytree(folders[layout], tmp_path / layout)

    return copy


def edit(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_and_spec_are_recognised(folders, layout):
    checkpoint = Checkpoint.open(folders[layout])
    assert (checkpoint.layout, checkpoint.spec) == (layout, SPEC)
    assert checkpoint.config == json.loads((folders[layout] / "config.json").read_text())
    assert checkpoint.nbytes() == sum(
        tensor.nbytes for tensor in load_file(folders[layout] / "model.safetensors").values()
    )


def test_the_three_layouts_hold_one_model(folders):
    packed, bf16, original = (Checkpoint.open(folders[layout]) for layout in LAYOUTS)
    assert packed.names() == original.names()
    for name in packed.names():
        assert torch.equal(packed.tensor(name), original.tensor(name)), name
    for name in bf16.names():
        if name in packed.stored:
            assert torch.equal(packed.tensor(name), bf16.tensor(name)), name
        else:
            blocks, scales = packed.tensor(f"{name}_blocks"), packed.tensor(f"{name}_scales")
            assert torch.equal(bf16.tensor(name), dequantize_mxfp4(blocks, scales, torch.bfloat16).transpose(1, 2))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_way_of_reading_agrees(folders, layout):
    checkpoint = Checkpoint.open(folders[layout])
    for name, spec in checkpoint.tensor_specs().items():
        tensor = checkpoint.tensor(name)
        assert (tensor.dtype, tuple(tensor.shape)) == (spec.dtype, spec.shape)
        assert torch.equal(checkpoint.read(name), tensor)
        assert torch.equal(checkpoint.read(name, 1, 3), tensor[1:3])
        data = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        assert b"".join(checkpoint.copy(name)) == data
        file, offset, nbytes = checkpoint.raw(name)
        assert file.read_bytes()[offset : offset + nbytes] == data


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_are_views_of_the_mapped_file(folders, layout):
    checkpoint = Checkpoint.open(folders[layout])
    file = folders[layout] / "model.safetensors"
    with open("/proc/self/maps", encoding="utf-8") as maps:
        checkpoint.tensor(Q_PROJ)
        spans = [line.split()[0].split("-") for line in maps if line.rstrip().endswith(str(file))]
    assert spans
    for name in checkpoint.names():
        pointer = checkpoint.tensor(name).data_ptr()
        assert any(int(low, 16) <= pointer < int(high, 16) for low, high in spans), name


def test_writing_to_a_mapped_tensor_leaves_the_file_alone(copied):
    folder = copied()
    before = (folder / "model.safetensors").read_bytes()
    Checkpoint.open(folder).tensor(Q_PROJ).zero_()
    assert (folder / "model.safetensors").read_bytes() == before


def test_shards_with_an_index_open_the_same(folders, tmp_path):
    (tmp_path / "config.json").write_text(SPEC.config_text("mxfp4"))
    write_shards(tmp_path, random_tensors(SPEC, 0, "mxfp4"), max_shard_bytes=200_000)
    sharded, whole = Checkpoint.open(tmp_path), Checkpoint.open(folders["mxfp4"])
    assert len({stored.file for stored in sharded.stored.values()}) > 2
    assert all(torch.equal(sharded.tensor(name), whole.tensor(name)) for name in whole.names())


def test_an_original_checkpoint_may_name_its_shards_freely(copied):
    folder = copied("original")
    (folder / "model.safetensors").rename(folder / "model--00001-of-00007.safetensors")
    assert Checkpoint.open(folder).layout == "original"


def test_a_name_of_another_layout_is_a_key_error(folders):
    with pytest.raises(KeyError, match="mxfp4 layout"):
        Checkpoint.open(folders["mxfp4"]).tensor("model.layers.0.mlp.experts.gate_up_proj")


def test_a_missing_tensor_is_named(copied):
    folder = copied()
    edit(folder, lambda tensors: tensors.pop(Q_PROJ))
    with pytest.raises(UserError, match=rf"1 of 41 tensors are missing: {Q_PROJ}"):
        Checkpoint.open(folder)


def test_an_unexpected_tensor_is_named_with_its_file(copied):
    folder = copied()
    edit(folder, lambda tensors: tensors.update({"model.extra": torch.zeros(3)}))
    with pytest.raises(UserError, match=r"1 are unexpected: model\.extra \(model\.safetensors\)"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("layout", ["bf16", "original"])
def test_a_transposed_tensor_is_named_with_both_shapes(copied, layout):
    name = {"bf16": "model.layers.0.mlp.experts.down_proj", "original": "block.0.mlp.mlp2_weight.scales"}[layout]
    folder = copied(layout)
    edit(folder, lambda tensors: tensors.update({name: tensors[name].transpose(1, 2).contiguous()}))
    with pytest.raises(UserError, match=rf"1 have another type or shape: {name} \(model\.safetensors\) is .* \[8, "):
        Checkpoint.open(folder)


def test_another_dtype_is_named(copied):
    folder = copied("bf16")
    edit(folder, lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ].float()}))
    with pytest.raises(UserError, match=rf"{Q_PROJ} .* is F32 \[256, 128\] where config.json asks for BF16"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("keep", [3, 100, -1])
def test_a_truncated_file_is_named(copied, keep):
    file = copied() / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=rf"{file} .*(truncated|no whole safetensors file)"):
        Checkpoint.open(file.parent)


def test_surplus_bytes_and_a_damaged_header_are_named(copied):
    file = copied() / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data + b"\0")
    with pytest.raises(UserError, match="is damaged"):
        Checkpoint.open(file.parent)
    file.write_bytes(data[:8] + b"x" + data[9:])
    with pytest.raises(UserError, match="damaged safetensors header"):
        Checkpoint.open(file.parent)


def test_half_a_download_names_the_absent_shards(tmp_path):
    (tmp_path / "config.json").write_text(SPEC.config_text("mxfp4"))
    files = write_shards(tmp_path, random_tensors(SPEC, 0, "mxfp4"), max_shard_bytes=200_000)
    files[1].unlink()
    with pytest.raises(UserError, match=rf"1 of the {len(files)} files .* absent: {files[1].name}"):
        Checkpoint.open(tmp_path)


def test_one_tensor_in_two_files_is_refused(copied):
    folder = copied()
    shutil.copy(folder / "model.safetensors", folder / "copy.safetensors")
    with pytest.raises(UserError, match=r"is in copy\.safetensors and in model\.safetensors"):
        Checkpoint.open(folder)


def test_folders_that_are_no_checkpoints(tmp_path, copied):
    with pytest.raises(UserError, match="is no folder"):
        Checkpoint.open(tmp_path / "absent")
    with pytest.raises(UserError, match=r"has no config\.json"):
        Checkpoint.open(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="it is an adapter"):
        Checkpoint.open(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        Checkpoint.open(tmp_path)
    folder = copied()
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no \*\.safetensors files"):
        Checkpoint.open(folder)


def test_other_models_and_quantizations_are_refused(copied):
    folder = copied()
    for change, named in (
        ({"model_type": "mixtral"}, "model_type is 'mixtral'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method is 'gptq'"),
    ):
        (folder / "config.json").write_text(json.dumps(SPEC.hf_config() | change))
        with pytest.raises(UserError, match=named):
            Checkpoint.open(folder)
