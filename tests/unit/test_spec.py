"""Sizes, configs and tensor tables against the published checkpoints and transformers' own model."""

import hashlib
from dataclasses import replace

import pytest
import torch

from gptoss_ft.errors import UserError
from gptoss_ft.model import layouts
from gptoss_ft.model.spec import SPECS, GptOssSpec


@pytest.mark.parametrize(
    ("name", "parameters", "packed_bytes", "bf16_bytes", "num_tensors"),
    [
        ("gpt_oss_20b", 20_914_757_184, 13_761_264_768, 41_829_514_368, 459),
        ("gpt_oss_120b", 116_829_156_672, 65_248_815_744, 233_658_313_344, 687),
    ],
)
def test_published_totals(name, parameters, packed_bytes, bf16_bytes, num_tensors):
    spec = SPECS[name]
    assert spec.num_parameters() == parameters
    assert spec.num_bytes("mxfp4") == spec.num_bytes("original") == packed_bytes
    assert spec.num_bytes("bf16") == bf16_bytes
    assert len(spec.tensors("mxfp4")) == num_tensors


def test_20b_config_is_the_published_file():
    text = SPECS["gpt_oss_20b"].config_text("mxfp4")
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "3a2a26ded679375b7928ddeca59764df7cea83220c1961035f6d6e232659e9ce"
    )


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_both_configs_read_back(spec):
    assert GptOssSpec.from_hf_config(spec.hf_config()) == spec
    assert GptOssSpec.from_original_config(spec.original_config()) == spec


def test_tiny_differs_from_the_real_shapes_only_in_size():
    tiny = SPECS["tiny"]
    assert tiny.hidden_size != tiny.intermediate_size
    assert tiny.vocab_size == 201088 and set(tiny.layer_types) == {"sliding_attention", "full_attention"}


def test_bf16_tensors_are_those_of_the_transformers_model():
    from transformers import GptOssConfig, GptOssForCausalLM

    spec = replace(SPECS["tiny"], vocab_size=64, head_dim=32, eos_token_id=63, pad_token_id=62)
    with torch.device("meta"):
        model = GptOssForCausalLM(GptOssConfig(**spec.hf_config()))
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in spec.tensors("bf16").items()} == wanted


def test_a_config_that_transformers_rewrote_reads_the_same(tmp_path):
    from transformers import GptOssConfig

    spec = SPECS["tiny"]
    GptOssConfig(**spec.hf_config()).save_pretrained(tmp_path)
    rewritten = GptOssConfig.from_pretrained(tmp_path).to_dict()
    assert "rope_parameters" in rewritten
    assert GptOssSpec.from_hf_config(rewritten) == spec


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"model_type": None}, "model_type"),
        ({"attention_bias": False}, "attention_bias"),
        ({"hidden_size": 100}, "hidden_size=100 is not a multiple of 32"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_local_experts": 2}, "num_experts_per_tok=4 exceeds"),
        ({"layer_types": ["full_attention"] * 4}, "layer_types"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "beta_fast"),
    ],
)
def test_foreign_hf_configs_are_refused_by_field(change, named):
    with pytest.raises(UserError, match=named):
        GptOssSpec.from_hf_config(SPECS["tiny"].hf_config() | change)


def test_missing_and_foreign_fields_are_named():
    hf, original = SPECS["tiny"].hf_config(), SPECS["tiny"].original_config()
    del hf["num_key_value_heads"]
    with pytest.raises(UserError, match="num_key_value_heads missing"):
        GptOssSpec.from_hf_config(hf)
    with pytest.raises(UserError, match="torch_dtype does not belong"):
        GptOssSpec.from_original_config(original | {"torch_dtype": "bfloat16"})
    del original["swiglu_limit"]
    with pytest.raises(UserError, match="swiglu_limit missing"):
        GptOssSpec.from_original_config(original)


def test_original_names_and_shapes_are_those_of_the_reference_implementation():
    from gpt_oss.torch.model import ModelConfig, Transformer
    from gpt_oss.torch.weights import PARAM_NAME_MAP

    spec = replace(SPECS["tiny"], vocab_size=64, num_hidden_layers=2)
    model = Transformer(ModelConfig(**spec.original_config()), device=torch.device("meta"))
    wanted = {}
    for name, parameter in model.named_parameters():
        stored = PARAM_NAME_MAP.get(name, name)
        if isinstance(stored, tuple):
            *rows, columns = parameter.shape
            wanted[stored[0]], wanted[stored[1]] = (*rows, columns // 32, 16), (*rows, columns // 32)
        else:
            wanted[stored] = tuple(parameter.shape)
    assert {name: tensor.shape for name, tensor in spec.tensors("original").items()} == wanted


def test_names_convert_both_ways_and_cover_everything():
    spec = SPECS["gpt_oss_20b"]
    back = [hf_name for name in spec.tensors("original") for hf_name in layouts.to_hf(name)]
    assert sorted(back) == sorted(spec.tensors("mxfp4"))
    assert all(name in layouts.to_hf(layouts.to_original(name)) for name in back)
    assert layouts.to_hf("block.3.attn.qkv.bias") == tuple(
        f"model.layers.3.self_attn.{part}_proj.bias" for part in "qkv"
    )


@pytest.mark.parametrize("name", ["model.layers.0.mlp.experts.gate_up_proj", "lm_head.bias", "block.0.attn.sinks"])
def test_an_unknown_name_is_an_error(name):
    with pytest.raises(KeyError, match="is no tensor"):
        layouts.to_original(name)
    with pytest.raises(KeyError, match="is no tensor"):
        layouts.to_hf(name.replace("block.", "blocks."))
