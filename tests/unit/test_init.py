"""Random checkpoints: deterministic, distributed as promised, written in little memory, and open elsewhere."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from gptoss_ft.errors import ConfigError, UserError
from gptoss_ft.kernels.codec import quantize_mxfp4, unpack_nibbles
from gptoss_ft.kernels.reference import dequantize_mxfp4
from gptoss_ft.model.checkpoint import Checkpoint
from gptoss_ft.model.init import init_checkpoint, random_expert
from gptoss_ft.model.spec import SPECS

SPEC = replace(SPECS["tiny"], vocab_size=2048, num_hidden_layers=2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return Checkpoint.open(init_checkpoint(SPEC, tmp_path_factory.mktemp("init") / "seed0", progress=False))


def test_the_seed_decides_every_byte(checkpoint, tmp_path):
    again = Checkpoint.open(init_checkpoint(SPEC, tmp_path / "again", progress=False))
    other = Checkpoint.open(init_checkpoint(SPEC, tmp_path / "other", seed=1, progress=False))
    for name in checkpoint.names():
        assert torch.equal(checkpoint.tensor(name), again.tensor(name)), name
        assert not torch.equal(checkpoint.tensor(name), other.tensor(name)), name


def test_no_two_tensors_or_experts_repeat(checkpoint):
    blocks = [checkpoint.tensor(name) for name in checkpoint.names() if name.endswith("_blocks")]
    starts = [bytes(expert.flatten()[:64].tolist()) for stack in blocks for expert in stack]
    assert len(set(starts)) == len(starts) == 2 * 2 * 8


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("model.embed_tokens.weight", 0, 1.0),
        ("lm_head.weight", 0, 0.3),
        ("model.layers.0.self_attn.o_proj.weight", 0, 256**-0.5),
        ("model.layers.0.mlp.experts.gate_up_proj_bias", 0, 0.02),
        ("model.layers.1.input_layernorm.weight", 1, 0.1),
    ],
)
def test_dense_tensors_have_the_stated_moments(checkpoint, name, mean, std):
    values = checkpoint.tensor(name).double()
    assert values.std().item() == pytest.approx(std, rel=0.15 if values.dim() == 1 else 0.03)
    assert values.mean().item() == pytest.approx(mean, abs=0.03)


@pytest.mark.parametrize(("rows", "groups"), [(512, 90), (2048, 4), (1024, 3)])
def test_experts_are_distributed_as_quantised_gaussians(rows, groups):
    blocks, scales = random_expert("x", rows, groups, seed=0)
    columns = groups * 32
    weights = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * columns**-0.5
    wanted_blocks, wanted_scales = quantize_mxfp4(weights)
    for found, wanted, bins, bound in (
        (scales, wanted_scales, 256, 0.015),
        (unpack_nibbles(blocks), unpack_nibbles(wanted_blocks), 16, 0.01),
    ):
        shares = [torch.bincount(part.flatten().long(), minlength=bins) / part.numel() for part in (found, wanted)]
        assert (shares[0] - shares[1]).abs().max() < bound
    std = dequantize_mxfp4(blocks, scales, torch.float64).std().item()
    assert std == pytest.approx(columns**-0.5, rel=0.05)


def test_codes_are_independent_of_their_neighbours():
    blocks, scales = random_expert("x", 512, 16, seed=0)
    values = dequantize_mxfp4(blocks, scales, torch.float64)
    for lag in (1, 2, 32):
        product = (values[:, lag:] * values[:, :-lag]).mean() / values.square().mean()
        assert abs(product.item()) < 0.01


def test_transformers_opens_it_in_both_hf_layouts_with_the_same_logits(checkpoint, tmp_path):
    from transformers import AutoModelForCausalLM

    spec = replace(SPEC, eos_token_id=1, pad_token_id=0)
    tokens = torch.arange(40)[None] * 37 % spec.vocab_size
    logits = []
    for layout in ("mxfp4", "bf16"):
        folder = init_checkpoint(spec, tmp_path / layout, layout=layout, progress=False)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            logits.append(model(tokens).logits)
    assert torch.equal(*logits)
    # Far from uniform, far from saturated: a frozen head of this size lets an adapter learn.
    assert 2 < logits[0].std() < 5


def test_the_real_vocabulary_comes_with_tokenizer_files(tmp_path):
    folder = init_checkpoint(replace(SPECS["tiny"], num_hidden_layers=1), tmp_path / "full", progress=False)
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
    }


def test_unknown_shapes_and_used_folders_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="model=huge is not one of tiny, gpt_oss_20b, gpt_oss_120b"):
        init_checkpoint("huge", tmp_path / "x", progress=False)
    (tmp_path / "file").write_text("kept")
    with pytest.raises(UserError, match="exists already"):
        init_checkpoint(SPEC, tmp_path, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
    """A 1 GB checkpoint is written within 0.2 GB of what importing takes."""
    script = f"""
import resource
from dataclasses import replace
from pathlib import Path
from gptoss_ft.model.init import init_checkpoint
from gptoss_ft.model.spec import SPECS
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
spec = replace(SPECS["gpt_oss_20b"], num_hidden_layers=2, vocab_size=4096)
before = peak()
init_checkpoint(spec, Path({str(tmp_path / "two_layers")!r}), progress=False)
print(spec.num_bytes(), (peak() - before) * 1024)
"""
    output = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    size, grown = map(int, output.split())
    assert size > 1e9 and grown < 0.2e9
