"""What a server's adapter loader cannot take is refused by the field's name, before anything is written."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from gptoss_ft.errors import UserError
from gptoss_ft.export.adapter import read_adapter
from gptoss_ft.export.gguf_adapter import export_adapter_gguf
from gptoss_ft.export.sglang_adapter import export_adapter_sglang
from gptoss_ft.export.vllm_adapter import export_adapter_vllm, max_lora_rank
from gptoss_ft.model.checkpoint import Checkpoint

EXPORTS = {"vllm": export_adapter_vllm, "sglang": export_adapter_sglang, "gguf": export_adapter_gguf}


@pytest.fixture(scope="module")
def base(small_bases):
    return Checkpoint.open(small_bases["mxfp4"])


@pytest.fixture(scope="module")
def adapter(base, random_adapter, tmp_path_factory):
    return random_adapter(base.path, tmp_path_factory.mktemp("adapter") / "adapter")


def refused(export, adapter, base, tmp_path, message):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message):
        export(adapter, tmp_path / "out", base)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("export", EXPORTS.values(), ids=EXPORTS)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("bias", "all"),
        ("lora_bias", True),
        ("modules_to_save", ["lm_head"]),
        ("init_lora_weights", "pissa"),
        ("layer_replication", [[0, 1]]),
    ],
)
def test_more_than_plain_lora(export, adapter, base, tmp_path, field, value):
    copy = shutil.copytree(adapter, tmp_path / "adapter")
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | {field: value}))
    refused(export, copy, base, tmp_path, field)


@pytest.mark.parametrize(("target", "missing"), [("gate_up_proj", "down_proj"), ("down_proj", "gate_up_proj")])
def test_vllm_takes_both_expert_projections_or_none(base, random_adapter, tmp_path, target, missing):
    adapter = random_adapter(base.path, tmp_path / "adapter", targets=[target, "attention"])
    refused(
        export_adapter_vllm, adapter, base, tmp_path, f"experts.{target} without {missing}.*both expert projections"
    )
    only_attention = random_adapter(base.path, tmp_path / "attention", targets=["attention", "router"])
    export_adapter_vllm(only_attention, tmp_path / "out", base)


def test_vllm_is_told_the_least_rank_that_it_can_be_started_with(base, random_adapter, tmp_path):
    for rank, wanted in ((1, 1), (3, 8), (16, 16), (17, 32), (300, 320), (512, 512)):
        adapter = random_adapter(base.path, tmp_path / f"r{rank}", targets=["k_proj"], r=rank)
        export_adapter_vllm(adapter, tmp_path / f"out{rank}", base)
        assert max_lora_rank(tmp_path / f"out{rank}") == wanted
    above = random_adapter(base.path, tmp_path / "above", targets=["k_proj"], r=513)
    refused(
        export_adapter_vllm, above, base, tmp_path, r"adapter_config\.json: r is 513, and vLLM's max_lora_rank ends"
    )


def test_vllm_looks_at_the_ranks_of_patterns(base, random_adapter, tmp_path):
    adapter = random_adapter(base.path, tmp_path / "adapter", targets=["k_proj"], r=600)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"r": 8, "rank_pattern": {"k_proj": 600}}))
    refused(export_adapter_vllm, adapter, base, tmp_path, "rank_pattern of k_proj is 600")


def test_sglang_adapts_no_router(base, random_adapter, tmp_path):
    adapter = random_adapter(base.path, tmp_path / "adapter", targets=["all", "router"])
    message = r"target_parameters include the router \(model.layers.0.mlp.router.weight\).*train without router"
    refused(export_adapter_sglang, adapter, base, tmp_path, message)


@pytest.mark.parametrize("export", EXPORTS.values(), ids=EXPORTS)
def test_an_adapter_of_another_base(export, adapter, base, tmp_path):
    copy = shutil.copytree(adapter, tmp_path / "adapter")
    tensors = load_file(copy / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    tensors[name] = tensors[name][:, :32].contiguous()
    save_file(tensors, copy / "adapter_model.safetensors")
    refused(export, copy, base, tmp_path, r"layers\.1\.self_attn\.q_proj .* another base")


def test_vllm_gets_the_files_that_peft_wrote(adapter, base, tmp_path):
    out = export_adapter_vllm(adapter, tmp_path / "out", base)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (out / name).read_bytes() == (adapter / name).read_bytes()
    assert read_adapter(out, base.spec).keys() == read_adapter(adapter, base.spec).keys()
