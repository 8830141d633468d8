"""Adapters for SGLang, rebuilt as its loader does and compared with every expert's update.

SGLang computes on GPUs only, so `as_sglang_loads` follows `lora.py`, `mem_pool.py` and `layers.py` of 0.5.23, and
`updates_of` the products of `lora_moe_runners.py`: modules are found by substrings of names, q, k and v are stacked, A
of gate_up is doubled, the rows of gate and up in B interleaved, a factor of another rank than adapter_config.json's `r`
is an error, `lora_alpha / r` scales B of experts in its buffer and the products of all others.

What it loads it also loads without a GPU, and a slow test compares its buffers with those. It pins other versions than
this package and needs CUDA's packages to serve, but not for that, so it has an environment of its own:

    python3.11 -m venv sglang-env && sglang-env/bin/pip install --no-deps sglang==0.5.23
    sglang-env/bin/pip install torch torchvision triton transformers setuptools aiohttp apache-tvm-ffi \\
        compressed-tensors einops fastapi gguf ipython loguru msgspec nvidia-ml-py openai orjson partial-json-parser \\
        pybase64 python-multipart pyzmq requests sentencepiece torch_memory_saver
    GPTOSS_FT_SGLANG_PYTHON=sglang-env/bin/python pytest -m slow tests/parity/test_sglang_adapter.py
"""

import json
import os
import re
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptoss_ft.data.sample import Sample
from gptoss_ft.errors import UserError
from gptoss_ft.export.adapter import read_adapter
from gptoss_ft.export.deltas import weight_shapes
from gptoss_ft.export.sglang_adapter import export_adapter_sglang, read_adapter_sglang
from gptoss_ft.export.verify import open_export, verify_export
from gptoss_ft.model.checkpoint import Checkpoint

VARIABLE = "GPTOSS_FT_SGLANG_PYTHON"
PYTHON = os.environ.get(VARIABLE)
PROGRAM = Path(__file__).with_name("sglang_program.py")

# Of its model: what `GptOssForCausalLM._lora_pattern_moe` wraps, and how names in `target_modules` are normalised.
NORMALISED = {name: "qkv_proj" for name in ("q_proj", "k_proj", "v_proj")}
NORMALISED |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}


def as_sglang_loads(folder, spec):
    """The buffers that SGLang would compute with, by `MODULE.FACTOR.LAYER`, and the scaling, in fp64."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"].lower() == "lora" and not config["use_dora"]
    r, scaling = config["r"], config["lora_alpha"] / config["r"]
    targets = {NORMALISED.get(name, name) for name in config["target_modules"]}
    layers = [{} for _ in range(spec.num_hidden_layers)]
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        layers[int(re.search(r"layers\.(\d+)\.", key)[1])][key] = tensor.double()
    buffers = {"scaling": torch.tensor(scaling)}
    for number, weights in enumerate(layers):
        for key in [key for key in weights if "q_proj" in key]:
            parts = [weights.pop(key.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")]
            weights[key.replace("q_proj", "qkv_proj")] = torch.cat(parts)
        for key in [key for key in weights if "gate_up_proj" in key and "lora_A" in key]:
            weights[key] = torch.cat((weights[key], weights[key]), dim=-2)
        for key in [key for key in weights if "gate_up_proj" in key and "lora_B" in key]:
            weights[key] = torch.stack(weights[key].chunk(2, dim=1), dim=2).flatten(1, 2)
        for key, tensor in weights.items():
            found = [target for target in targets if target in key]
            assert found, f"{key} would be skipped with a warning"
            module, factor = max(found, key=len), "A" if "lora_A" in key else "B"
            is_experts = "experts" in key
            assert tensor.dim() == (3 if is_experts else 2)
            slices = {"qkv_proj": 3, "gate_up_proj": 2}.get(module, 1)
            assert tensor.shape[-2 if factor == "A" else -1] == (slices * r if factor == "A" else r)
            if is_experts:
                # The experts are wrapped where both are targets.
                assert {"gate_up_proj", "down_proj"} <= targets
                tensor = tensor * (scaling if factor == "B" else 1)
            buffers[f"{module}{'_moe' * is_experts}.{factor}.{number}"] = tensor
    return buffers


def updates_of(buffers, spec):
    """Updates by HF weight name, dense in fp64, as products of the buffers."""
    updates = {}
    for number in range(spec.num_hidden_layers):
        prefix = f"model.layers.{number}"
        for module in ("qkv_proj", "o_proj", "gate_up_proj_moe", "down_proj_moe"):
            if f"{module}.A.{number}" not in buffers:
                continue
            A, B = (buffers[f"{module}.{factor}.{number}"].double() for factor in "AB")
            r = B.shape[-1]
            if "moe" not in module:
                B = B * buffers["scaling"].double()
            if module == "qkv_proj":
                for part, (name, rows) in enumerate(spec_rows(spec).items()):
                    updates[f"{prefix}.self_attn.{name}.weight"] = B[rows] @ A[part * r : (part + 1) * r]
            elif module == "o_proj":
                updates[f"{prefix}.self_attn.o_proj.weight"] = B @ A
            elif module == "down_proj_moe":
                updates[f"{prefix}.mlp.experts.down_proj"] = B @ A
            else:
                # One product for the first half of the rows, another for the second, each with an A of its own.
                half = B.shape[1] // 2
                products = B[:, :half] @ A[:, :r], B[:, half:] @ A[:, r:]
                updates[f"{prefix}.mlp.experts.gate_up_proj"] = torch.cat(products, dim=1)
    return updates


def spec_rows(spec):
    q, kv = (64 * heads for heads in (spec.num_attention_heads, spec.num_key_value_heads))
    return {"q_proj": slice(0, q), "k_proj": slice(q, q + kv), "v_proj": slice(q + kv, q + 2 * kv)}


def check(folder, adapter, spec, buffers=None):
    """Every weight of the model is updated by scaling · B A, and the others by nothing."""
    found = updates_of(as_sglang_loads(folder, spec) if buffers is None else buffers, spec)
    trained = read_adapter(adapter, spec)
    assert any(trained[name].factors(0 if trained[name].A.dim() == 3 else None) for name in trained)
    for name, shape in weight_shapes(spec).items():
        delta = trained.get(name)
        wanted = torch.zeros(shape).double() if delta is None else delta.scaling * (delta.B.double() @ delta.A.double())
        got = found.pop(name, torch.zeros(shape).double())
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6 * float(wanted.abs().max()), msg=name)
    assert not found


def test_every_expert_is_updated_as_trained(peer, tmp_path):
    out = export_adapter_sglang(peer.adapter, tmp_path / "out", peer.base, progress=False)
    check(out, peer.adapter, peer.spec)
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (peer.rank, 2 * peer.rank)
    experts = f"base_model.model.model.layers.{peer.spec.num_hidden_layers - 1}.mlp.experts"
    shapes = {key: list(tensor.shape) for key, tensor in load_file(out / "adapter_model.safetensors").items()}
    E, H, K, r = peer.spec.num_local_experts, peer.spec.hidden_size, peer.spec.intermediate_size, peer.rank
    assert shapes[f"{experts}.gate_up_proj.lora_A.weight"] == [E, r, H]
    assert shapes[f"{experts}.gate_up_proj.lora_B.weight"] == [E, 2 * K, r]
    assert shapes[f"{experts}.down_proj.lora_A.weight"] == [E, r, K]
    assert shapes[f"{experts}.down_proj.lora_B.weight"] == [E, H, r]


@pytest.mark.slow
@pytest.mark.skipif(PYTHON is None, reason=f"{VARIABLE} names no interpreter with SGLang: see the head of this file")
def test_sglang_fills_these_buffers(peer, tmp_path):
    out = export_adapter_sglang(peer.adapter, tmp_path / "out", peer.base, progress=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (peer.bases["bf16"], out, port, tmp_path / "buffers.safetensors")
    done = subprocess.run([PYTHON, PROGRAM, *map(str, arguments)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found, rebuilt = load_file(arguments[-1]), as_sglang_loads(out, peer.spec)
    assert found.keys() == rebuilt.keys()
    for name, wanted in rebuilt.items():
        assert torch.equal(found[name].double(), wanted.double()), name
    check(out, peer.adapter, peer.spec, found)


CASES = {
    "rslora": {"use_rslora": True},
    "one projection": {"targets": ["gate_up_proj"]},
    "the other projection": {"targets": ["down_proj"]},
    "one of q, k and v": {"targets": ["v_proj", "o_proj"]},
    "one layer": {"targets": ["all"], "layers": [1]},
    "two experts": {"targets": ["experts"], "experts": [0, 3]},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_it_does_not_read_is_worked_in(peer, random_adapter, tmp_path, case):
    adapter = random_adapter(peer.bases["mxfp4"], tmp_path / "adapter", **case)
    check(export_adapter_sglang(adapter, tmp_path / "out", peer.base, progress=False), adapter, peer.spec)


def test_patterns_of_ranks_and_alphas_are_worked_in(peer, tmp_path):
    """Half of the ranks are cut down in two modules, and their alphas changed, as PEFT's patterns say it."""
    adapter = shutil.copytree(peer.adapter, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    rank = max(1, peer.rank // 2)
    config |= {"rank_pattern": {"layers.1.self_attn.o_proj": rank}, "alpha_pattern": {"mlp.experts.down_proj": 7}}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(adapter / "adapter_model.safetensors")
    for factor, dim in (("A", 0), ("B", 1)):
        key = f"base_model.model.model.layers.1.self_attn.o_proj.lora_{factor}.weight"
        tensors[key] = tensors[key].narrow(dim, 0, rank).contiguous()
    save_file(tensors, adapter / "adapter_model.safetensors")
    check(export_adapter_sglang(adapter, tmp_path / "out", peer.base, progress=False), adapter, peer.spec)


def samples(peer):
    ids = peer.ids(40).tolist()
    return [Sample(ids, [0.0] * 20 + [1.0] * 20, "rows.jsonl:1", 0)]


def test_verify_reads_it_back(peer, tmp_path):
    out = export_adapter_sglang(peer.adapter, tmp_path / "out", peer.base, progress=False)
    options = {"base": peer.bases["mxfp4"], "adapter": peer.adapter, "samples": samples(peer), "max_tokens": 16}
    report = verify_export(export=out, progress=False, **options)
    assert report.format == "adapter_sglang" and report.verdict == "PASSED", str(report)
    assert "GPU" in report.not_run["sglang"]

    file = out / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.1.mlp.experts.gate_up_proj.lora_B.weight"
    tensors[name] = torch.stack(tensors[name].chunk(2, dim=1), dim=2).flatten(1, 2)
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"adapter_model\.safetensors has"):
        verify_export(export=out, progress=False, **options)
    (out / "manifest.json").unlink()
    report = verify_export(export=out, progress=False, **options)
    assert report.verdict == "FAILED" and "layers.1.mlp.experts.gate_up_proj" in report.failures[0]


def test_without_experts_it_is_an_adapter_of_peft(small_bases, small_spec, random_adapter, tmp_path):
    adapter = random_adapter(small_bases["mxfp4"], tmp_path / "adapter", targets=["attention"])
    base = Checkpoint.open(small_bases["mxfp4"])
    out = export_adapter_sglang(adapter, tmp_path / "out", base, progress=False)
    check(out, adapter, small_spec)
    assert open_export(base, out)[0] == "adapter"


def damage_key(tensors):
    tensors["base_model.model.model.layers.0.mlp.router.lora_A.weight"] = torch.ones(1)


def damage_pair(tensors):
    del tensors["base_model.model.model.layers.0.mlp.experts.down_proj.lora_B.weight"]


def damage_rank(tensors):
    key = "base_model.model.model.layers.0.mlp.experts.down_proj.lora_A.weight"
    tensors[key] = tensors[key][:, :-1].contiguous()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_key, r"layers\.0\.mlp\.router\.lora_A\.weight is no tensor that SGLang takes"),
        (damage_pair, r"layers\.0\.mlp\.experts\.down_proj has only lora_A"),
        (damage_rank, r"layers\.0\.mlp\.experts\.down_proj has rank 3 where adapter_config\.json says 4"),
    ],
)
def test_a_damaged_file_is_named(small_bases, small_spec, random_adapter, tmp_path, damage, message):
    adapter = random_adapter(small_bases["mxfp4"], tmp_path / "adapter")
    out = export_adapter_sglang(adapter, tmp_path / "out", Checkpoint.open(small_bases["mxfp4"]), progress=False)
    tensors = load_file(out / "adapter_model.safetensors")
    damage(tensors)
    save_file(tensors, out / "adapter_model.safetensors")
    with pytest.raises(UserError, match=message):
        read_adapter_sglang(out, small_spec)
