"""GGUF exports, read with the `gguf` package: names, types, every number, metadata, and what is refused."""

import json
import shutil
from dataclasses import replace

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from gptoss_ft.adapters.attach import Targets, attach_adapters
from gptoss_ft.adapters.save import save_adapter
from gptoss_ft.errors import UserError
from gptoss_ft.export.adapter import read_adapter
from gptoss_ft.export.deltas import LowRankDelta, weight_shapes
from gptoss_ft.export.gguf_adapter import export_adapter_gguf, read_adapter_gguf
from gptoss_ft.export.gguf_layout import from_ggml_blocks, to_ggml_blocks
from gptoss_ft.export.gguf_read import GgufModel
from gptoss_ft.export.merge import merge
from gptoss_ft.harmony.vocabulary import PATTERN
from gptoss_ft.kernels import dispatch
from gptoss_ft.kernels.reference import dequantize_mxfp4
from gptoss_ft.model.checkpoint import Checkpoint
from gptoss_ft.model.init import init_checkpoint
from gptoss_ft.model.load import load_base

LAYER = "model.layers.1"
GATE_UP, DOWN = f"{LAYER}.mlp.experts.gate_up_proj", f"{LAYER}.mlp.experts.down_proj"
Q_PROJ, ROUTER = f"{LAYER}.self_attn.q_proj.weight", f"{LAYER}.mlp.router.weight"


@pytest.fixture(scope="module")
def base(small_bases):
    return Checkpoint.open(small_bases["mxfp4"])


def export(base, out, format="gguf", deltas=None):
    report = merge(base, deltas or {}, out, format=format, progress=False)
    return out / "model.gguf", report


def delta(spec, name, *, rank=2, share=0.3):
    """A random update; of expert stacks, expert 2 has none."""
    generator = torch.Generator().manual_seed(0)
    *experts, rows, columns = weight_shapes(spec)[name]
    up = torch.randn(*experts, rows, rank, generator=generator)
    if experts:
        up[2] = 0
    return LowRankDelta(torch.randn(*experts, rank, columns, generator=generator) * columns**-0.5, up, share)


def test_ggml_blocks_hold_the_same_bits_in_another_order():
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 5, 2, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(0, 255, (3, 5, 2), dtype=torch.uint8, generator=generator)
    packed = to_ggml_blocks(blocks, scales)
    assert packed.shape == (3, 5, 34)
    assert all(torch.equal(*pair) for pair in zip(from_ggml_blocks(packed), (blocks, scales), strict=True))
    values = torch.from_numpy(gguf.dequantize(packed.numpy(), gguf.GGMLQuantizationType.MXFP4))
    assert torch.equal(values, dequantize_mxfp4(blocks, scales, torch.float32))


def test_kernels_decode_what_a_file_holds(caplog, monkeypatch):
    packed = to_ggml_blocks(
        torch.zeros(3, 32, 2, 16, dtype=torch.uint8), torch.full((3, 32, 2), 120, dtype=torch.uint8)
    )
    operation = dispatch.dequantize_mxfp4
    monkeypatch.setattr(operation, "_told", set())
    operation(*from_ggml_blocks(packed), torch.float32)
    assert "not contiguous" not in caplog.text


# llama.cpp's names and what they hold, written out: the code takes the names from the `gguf` package.
def expected(base, layer):
    """Name -> (type, values) of a layer by hand, with all numbers in fp32."""

    def read(name):
        return base.tensor(f"model.layers.{layer}.{name}").float()

    def experts(name):
        packed = (base.tensor(f"model.layers.{layer}.mlp.experts.{name}_{part}") for part in ("blocks", "scales"))
        return dequantize_mxfp4(*packed, torch.float32)

    gate_up, gate_up_bias = experts("gate_up_proj"), read("mlp.experts.gate_up_proj_bias")
    matrices = {f"attn_{part}": f"self_attn.{part}_proj" for part in "qkv"} | {"attn_output": "self_attn.o_proj"}
    tensors = {f"{name}.weight": ("BF16", read(f"{hf_name}.weight")) for name, hf_name in matrices.items()}
    tensors |= {f"{name}.bias": ("F32", read(f"{hf_name}.bias")) for name, hf_name in matrices.items()}
    tensors |= {
        "attn_norm.weight": ("F32", read("input_layernorm.weight")),
        "post_attention_norm.weight": ("F32", read("post_attention_layernorm.weight")),
        "attn_sinks.weight": ("F32", read("self_attn.sinks")),
        "ffn_gate_inp.weight": ("F32", read("mlp.router.weight")),
        "ffn_gate_inp.bias": ("F32", read("mlp.router.bias")),
        "ffn_gate_exps.weight": ("MXFP4", gate_up[:, 0::2]),
        "ffn_up_exps.weight": ("MXFP4", gate_up[:, 1::2]),
        "ffn_down_exps.weight": ("MXFP4", experts("down_proj")),
        "ffn_gate_exps.bias": ("F32", gate_up_bias[:, 0::2]),
        "ffn_up_exps.bias": ("F32", gate_up_bias[:, 1::2]),
        "ffn_down_exps.bias": ("F32", read("mlp.experts.down_proj_bias")),
    }
    return {f"blk.{layer}.{name}": tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("layout", ["mxfp4", "bf16", "original"])
def test_every_tensor_is_where_llama_cpp_looks_for_it(base, small_bases, tmp_path, layout):
    file, report = export(Checkpoint.open(small_bases[layout]), tmp_path / "out")
    wanted = expected(base, 0) | expected(base, 1)
    wanted["token_embd.weight"] = ("BF16", base.tensor("model.embed_tokens.weight").float())
    wanted["output.weight"] = ("BF16", base.tensor("lm_head.weight").float())
    wanted["output_norm.weight"] = ("F32", base.tensor("model.norm.weight").float())
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    assert tensors.keys() == wanted.keys()
    for name, (type, values) in wanted.items():
        assert tensors[name].tensor_type.name == type, name
        found = torch.from_numpy(gguf.dequantize(tensors[name].data.copy(), tensors[name].tensor_type))
        assert found.shape == values.shape and torch.equal(found, values), name
    assert not report.updates if layout != "bf16" else len(report.updates) == 4


def test_untouched_experts_keep_their_bits(base, tmp_path):
    deltas = {name: delta(base.spec, name) for name in (GATE_UP, Q_PROJ)}
    model = GgufModel(export(base, tmp_path / "out", deltas=deltas)[0], base)
    for name in base.names():
        same = torch.equal(model.read(name), base.read(name))
        assert same == (name not in (f"{GATE_UP}_blocks", f"{GATE_UP}_scales", Q_PROJ)), name
    for part in ("blocks", "scales"):
        assert torch.equal(model.read(f"{GATE_UP}_{part}", 2, 3), base.read(f"{GATE_UP}_{part}", 2, 3))


def test_updates_are_merged_as_in_the_mxfp4_format(base, tmp_path):
    deltas = {name: delta(base.spec, name) for name in (GATE_UP, DOWN, Q_PROJ, ROUTER)}
    file, report = export(base, tmp_path / "out", deltas=deltas)
    other = merge(base, deltas, tmp_path / "mxfp4", format="mxfp4", progress=False)
    model, merged = GgufModel(file, base), Checkpoint.open(tmp_path / "mxfp4")
    for name in merged.names():
        assert torch.equal(model.read(name).float(), merged.read(name).float()), name
    assert report.updates == other.updates


def test_eight_bits_are_within_half_a_step(base, tmp_path):
    file, report = export(base, tmp_path / "out", "gguf_q8_0")
    model = GgufModel(file, base)
    assert model.format == "gguf_q8_0" and len(model.rounded) == 2 + 4 * base.spec.num_hidden_layers
    for name in model.rounded:
        wanted_GV = base.read(name).float().unflatten(-1, (-1, 32))
        error_GV = (model.read(name).unflatten(-1, (-1, 32)) - wanted_GV).abs()
        # Half a step, and the scale's own rounding to fp16.
        assert (error_GV <= wanted_GV.abs().amax(-1, keepdim=True) * (0.5 / 127 + 2.0**-11)).all(), name
        assert error_GV.any()
    assert torch.equal(model.read(f"{GATE_UP}_blocks"), base.read(f"{GATE_UP}_blocks"))
    assert report.num_copied == len(base.spec.tensors("bf16")) - len(model.rounded)


def test_sizes_and_rotary_embedding_are_in_the_head(base, tmp_path):
    spec = base.spec
    fields = gguf.GGUFReader(export(base, tmp_path / "out")[0]).fields
    wanted = {
        "block_count": spec.num_hidden_layers,
        "context_length": 131072,
        "embedding_length": spec.hidden_size,
        "feed_forward_length": spec.intermediate_size,
        "expert_feed_forward_length": spec.intermediate_size,
        "expert_count": spec.num_local_experts,
        "expert_used_count": spec.num_experts_per_tok,
        "attention.head_count": spec.num_attention_heads,
        "attention.head_count_kv": spec.num_key_value_heads,
        "attention.key_length": 64,
        "attention.value_length": 64,
        "attention.sliding_window": spec.sliding_window,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "rope.freq_base": 150000,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 32,
        "rope.scaling.original_context_length": 4096,
        "rope.scaling.yarn_beta_fast": 32,
        "rope.scaling.yarn_beta_slow": 1,
        "vocab_size": spec.vocab_size,
    }
    assert {key: fields[f"gpt-oss.{key}"].contents() for key in wanted} == wanted
    assert fields["general.architecture"].contents() == "gpt-oss"
    assert fields["tokenizer.ggml.model"].contents() == "none"


def test_a_model_that_llama_cpp_would_run_otherwise_is_refused(small_spec, tmp_path):
    spec = replace(small_spec, swiglu_limit=5.0)
    base = Checkpoint.open(init_checkpoint(spec, tmp_path / "base", progress=False))
    for write in (
        lambda: merge(base, {}, tmp_path / "out", format="gguf", progress=False),
        lambda: export_adapter_gguf(tmp_path / "adapter", tmp_path / "out", base, progress=False),
    ):
        with pytest.raises(UserError, match=r"swiglu_limit is 5\.0, and llama\.cpp computes with 7\.0"):
            write()
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_scale_of_nan_is_refused_and_leaves_nothing(small_bases, tmp_path):
    base = shutil.copytree(small_bases["mxfp4"], tmp_path / "base")
    (file,) = base.glob("*.safetensors")
    tensors = load_file(file)
    tensors[f"{GATE_UP}_scales"][1, 3, 0] = 255
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"{GATE_UP} holds NaN"):
        export(Checkpoint.open(base), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def with_tokenizer(folder, out, **changed):
    """A copy of a base with a tokenizer of five tokens."""
    vocab = {"a": 0, "b": 1, "Ġ": 2, "ab": 3}
    content = {
        "added_tokens": [{"id": 4, "content": "<|return|>", "special": True}],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": PATTERN}}]},
        "model": {"type": "BPE", "vocab": vocab, "merges": [["a", "b"]]},
    }
    shutil.copytree(folder, out)
    (out / "tokenizer.json").write_text(json.dumps(content | changed))
    (out / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|return|>"}))
    (out / "chat_template.jinja").write_text("{{ messages }}")
    return Checkpoint.open(out)


def test_the_tokenizer_of_the_base_is_in_the_head(small_bases, tmp_path):
    base = with_tokenizer(small_bases["mxfp4"], tmp_path / "base")
    fields = gguf.GGUFReader(export(base, tmp_path / "out")[0]).fields
    found = {name.removeprefix("tokenizer."): field.contents() for name, field in fields.items() if "token" in name}
    tokens, types = found["ggml.tokens"], found["ggml.token_type"]
    assert tokens[:6] == ["a", "b", "Ġ", "ab", "<|return|>", "[PAD5]"] and len(tokens) == base.spec.vocab_size
    assert types[:6] == [1, 1, 1, 1, 3, 5] and len(types) == len(tokens)  # normal, control, unused
    assert (found["ggml.model"], found["ggml.pre"], found["ggml.merges"]) == ("gpt2", "gpt-4o", ["a b"])
    assert (found["ggml.eos_token_id"], found["ggml.add_bos_token"]) == (4, False)
    assert found["chat_template"] == "{{ messages }}"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"pre_tokenizer": {"type": "ByteLevel"}}, "does not split text as o200k_harmony does"),
        ({"added_tokens": [{"id": 9999, "content": "<|x|>"}]}, "token 9999, beyond its vocabulary of 512"),
    ],
)
def test_tokenizers_that_llama_cpp_cannot_have_are_refused(small_bases, tmp_path, changed, message):
    base = with_tokenizer(small_bases["mxfp4"], tmp_path / "base", **changed)
    with pytest.raises(UserError, match=message):
        export(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def rewrite(file, out, *, keys=lambda key, value: value, tensors=lambda name: name):
    """The same file with other values of keys, and tensors renamed or, by None, left out."""
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(out, "gpt-oss")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_key_value(name, keys(name, field.contents()), field.types[0], field.types[-1])
    for tensor in reader.tensors:
        if name := tensors(tensor.name):
            writer.add_tensor(name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def truncate(file, out):
    out.write_bytes(file.read_bytes()[:-1000])
    return out


DAMAGES = {
    r"is no whole GGUF file": truncate,
    r"has no blk\.1\.attn_sinks\.weight": lambda file, out: rewrite(
        file, out, tensors=lambda name: None if name == "blk.1.attn_sinks.weight" else name
    ),
    r"holds blk\.7\.attn_sinks\.weight, which no gpt-oss model has|has no blk\.1": lambda file, out: rewrite(
        file, out, tensors=lambda name: name.replace("blk.1.attn_sinks", "blk.7.attn_sinks")
    ),
    r"gpt-oss\.attention\.sliding_window is 9 where the base has 8": lambda file, out: rewrite(
        file, out, keys=lambda key, value: value + (key == "gpt-oss.attention.sliding_window") if value == 8 else value
    ),
    r"rope\.scaling\.type is another": lambda file, out: rewrite(
        file, out, keys=lambda key, value: "linear" if value == "yarn" else value
    ),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_damaged_files_are_named(base, tmp_path, message):
    file, _ = export(base, tmp_path / "out")
    with pytest.raises(UserError, match=message):
        GgufModel(DAMAGES[message](file, tmp_path / "damaged.gguf"), base)
    assert GgufModel(rewrite(file, tmp_path / "same.gguf"), base).format == "gguf"


@pytest.fixture(scope="module", params=["plain", "rslora", "patterns", "experts"])
def adapter(request, small_spec, small_bases, tmp_path_factory):
    """A random adapter as training saves it."""
    folder = tmp_path_factory.mktemp("adapter") / request.param
    names = ["experts"] if request.param == "experts" else ["all", "router"]
    targets = Targets.parse(names, num_layers=small_spec.num_hidden_layers, num_experts=small_spec.num_local_experts)
    model, _ = attach_adapters(
        load_base(small_bases["mxfp4"]), targets, r=3, alpha=5, use_rslora=request.param == "rslora"
    )
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    save_adapter(model, folder)
    if request.param == "patterns":
        config = json.loads((folder / "adapter_config.json").read_text())
        config["alpha_pattern"] = {"down_proj": 7, "k_proj": 2}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_adapters_come_back_as_the_same_updates(base, adapter, tmp_path):
    out = export_adapter_gguf(adapter, tmp_path / "out", base, progress=False)
    wanted, found = read_adapter(adapter, base.spec), read_adapter_gguf(out / "adapter.gguf", base.spec)
    assert wanted.keys() == found.keys()
    for name, update in wanted.items():
        torch.testing.assert_close(
            found[name].scaling * (found[name].B @ found[name].A),
            update.scaling * (update.B.float() @ update.A.float()),
            rtol=1e-5,
            atol=1e-7,
        )


def test_adapters_are_named_as_llama_cpp_pairs_them(base, adapter, tmp_path):
    file = export_adapter_gguf(adapter, tmp_path / "out", base, progress=False) / "adapter.gguf"
    reader = gguf.GGUFReader(file)
    fields = {name: reader.fields[name].contents() for name in ("general.type", "adapter.type", "adapter.lora.alpha")}
    shapes = {tensor.name: tuple(reversed(tensor.shape.tolist())) for tensor in reader.tensors}
    spec, updates = base.spec, read_adapter(adapter, base.spec)
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    for stem, rows, columns in (
        ("ffn_gate_exps", spec.intermediate_size, spec.hidden_size),
        ("ffn_up_exps", spec.intermediate_size, spec.hidden_size),
        ("ffn_down_exps", spec.hidden_size, spec.intermediate_size),
    ):
        assert shapes[f"blk.1.{stem}.weight.lora_a"] == (spec.num_local_experts, 3, columns)
        assert shapes[f"blk.1.{stem}.weight.lora_b"] == (spec.num_local_experts, rows, 3)
    # llama.cpp multiplies every update by alpha / r, so B has to carry the rest.
    factors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    up = factors["blk.1.ffn_up_exps.weight.lora_b"] @ factors["blk.1.ffn_up_exps.weight.lora_a"]
    update = updates[GATE_UP]
    wanted = update.scaling * (update.B.float() @ update.A.float())[:, 1::2]
    torch.testing.assert_close(fields["adapter.lora.alpha"] / 3 * up, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(keys=lambda key, value: "model" if value == "adapter" else value), r"general\.type is 'model'"),
        (
            dict(tensors=lambda name: None if name == "blk.0.ffn_up_exps.weight.lora_b" else name),
            r"has no blk\.0\.ffn_up",
        ),
        (dict(tensors=lambda name: name.replace("blk.1", "blk.9")), r"holds blk\.9"),
    ],
)
def test_damaged_adapters_are_named(base, adapter, tmp_path, change, message):
    file = export_adapter_gguf(adapter, tmp_path / "out", base, progress=False) / "adapter.gguf"
    with pytest.raises(UserError, match=message):
        read_adapter_gguf(rewrite(file, tmp_path / "damaged.gguf", **change), base.spec)
