"""Our packed model against transformers' own load of the same files."""

import json
import shutil

import pytest
import torch
from transformers import GptOssForCausalLM

from gptoss_ft.errors import UserError
from gptoss_ft.model.experts import PackedExperts
from gptoss_ft.model.load import load_base


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 500, (2, 40), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits.double()


def stock(folder, *, dtype):
    return GptOssForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")


def distance(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("layout", ["mxfp4", "original"])
@pytest.mark.parametrize("precision", ["mxfp4", "bf16"])
def test_fp32_logits_equal_transformers_dequantized_load(small_bases, ids, layout, precision):
    expected = logits(stock(small_bases["mxfp4"], dtype=torch.float32), ids)
    got = logits(load_base(small_bases[layout], precision=precision, dtype=torch.float32), ids)
    assert distance(got, expected) < 1e-5


def test_bf16_layout_equals_transformers(small_bases, ids):
    expected = logits(stock(small_bases["bf16"], dtype=torch.float32), ids)
    got = logits(load_base(small_bases["bf16"], precision="bf16", dtype=torch.float32), ids)
    assert distance(got, expected) < 1e-5


@pytest.mark.parametrize("layout", ["mxfp4", "original"])
def test_bf16_logits_are_within_twice_the_error_of_transformers(small_bases, layout):
    ids = torch.randint(0, 500, (8, 40), generator=torch.Generator().manual_seed(1))
    exact = logits(stock(small_bases["mxfp4"], dtype=torch.float32), ids)

    def typical_error(model):
        # A position where bf16 tips the router to another expert is far off in either program: compare the median.
        error = (logits(model, ids) - exact).norm(dim=-1) / exact.norm(dim=-1)
        return float(error.median())

    budget = typical_error(stock(small_bases["mxfp4"], dtype=torch.bfloat16))
    assert 0 < typical_error(load_base(small_bases[layout], dtype=torch.bfloat16)) <= 2 * budget


def test_bf16_experts_and_gradients_are_within_twice_the_error_of_transformers(small_bases):
    generator = torch.Generator().manual_seed(0)
    hidden, upstream = (torch.randn(32, 64, generator=generator) for _ in range(2))
    experts = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(32)])
    routing = torch.rand(32, 2, generator=generator).softmax(-1)

    def run(load, dtype):
        block = load(small_bases["mxfp4"], dtype=dtype).model.layers[0].mlp.experts
        h = hidden.to(dtype).requires_grad_()
        out = block(h, experts, routing.to(dtype))
        (gradient,) = torch.autograd.grad(out, h, upstream.to(dtype))
        return out.detach().double(), gradient.double()

    exact, budget, got = run(stock, torch.float32), run(stock, torch.bfloat16), run(load_base, torch.bfloat16)
    for mine, theirs, truth in zip(got, budget, exact, strict=True):
        assert 0 < (mine - truth).norm() <= 2 * (theirs - truth).norm()


@pytest.mark.parametrize("layout", ["mxfp4", "original"])
def test_packed_experts_are_the_files_own_bytes_and_take_no_private_memory(small_bases, layout):
    model = load_base(small_bases[layout])
    assert all(isinstance(layer.mlp.experts, PackedExperts) for layer in model.model.layers)
    mapped = _mapped_ranges(str(small_bases[layout]))
    for name, parameter in model.named_parameters():
        if name.endswith(("_blocks", "_scales")):
            assert parameter.dtype == torch.uint8
            assert any(low <= parameter.data_ptr() < high for low, high in mapped), f"{name} is a copy"
        assert not parameter.requires_grad


def _mapped_ranges(folder):
    ranges = []
    with open("/proc/self/maps") as maps:
        for line in maps:
            if folder in line:
                low, high = line.split()[0].split("-")
                ranges.append((int(low, 16), int(high, 16)))
    return ranges


def test_generation_with_a_cache_equals_generation_without(small_bases, ids):
    model = load_base(small_bases["mxfp4"], dtype=torch.float32)
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with_cache = model.generate(ids, use_cache=True, **settings)
    assert torch.equal(with_cache, model.generate(ids, use_cache=False, **settings))


def test_bf16_experts_cannot_be_kept_packed(small_bases):
    with pytest.raises(UserError, match=r"model\.precision=bf16"):
        load_base(small_bases["bf16"])


def test_another_architecture_is_refused(small_bases, tmp_path):
    folder = shutil.copytree(small_bases["mxfp4"], tmp_path / "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    )
    with pytest.raises(UserError, match="llama"):
        load_base(folder)
