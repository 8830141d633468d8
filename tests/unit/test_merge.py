"""Merging against dense fp64 arithmetic, against stock PEFT, and reopened with transformers."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptoss_ft.errors import UserError
from gptoss_ft.export.adapter import export_adapter, read_adapter
from gptoss_ft.export.deltas import LowRankDelta, weight_shapes
from gptoss_ft.export.merge import merge
from gptoss_ft.kernels.codec import even_scales, quantize_mxfp4
from gptoss_ft.kernels.reference import dequantize_mxfp4
from gptoss_ft.model.checkpoint import Checkpoint
from gptoss_ft.model.init import init_checkpoint
from gptoss_ft.model.spec import SPECS

SMALL = replace(SPECS["tiny"], vocab_size=96, num_hidden_layers=2, eos_token_id=1, pad_token_id=0)
SPECS_UNDER_TEST = {
    "wide": SMALL,
    "narrow": replace(SMALL, hidden_size=64, intermediate_size=160, num_local_experts=6, num_key_value_heads=1),
}
GATE_UP, DOWN = "model.layers.1.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"
Q_PROJ, ROUTER = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.router.weight"


@pytest.fixture(scope="module", params=SPECS_UNDER_TEST)
def bases(request, tmp_path_factory):
    spec, root = SPECS_UNDER_TEST[request.param], tmp_path_factory.mktemp(request.param)
    return {
        layout: Checkpoint.open(init_checkpoint(spec, root / layout, layout=layout, progress=False))
        for layout in ("mxfp4", "bf16", "original")
    }


@pytest.fixture
def base(bases):
    return bases["mxfp4"]


def make_delta(spec, name, share=0.3, rank=4, seed=0):
    """An update of about `share` of a fan-in scaled weight; in expert stacks, expert 2 has none."""
    generator = torch.Generator().manual_seed(seed)
    *experts, rows, columns = weight_shapes(spec)[name]
    down = torch.randn(*experts, rank, columns, generator=generator) * columns**-0.5
    up = torch.randn(*experts, rows, rank, generator=generator)
    if experts:
        up[2] = 0
    return LowRankDelta(down, up, share * rank**-0.5)


def make_deltas(spec):
    return {name: make_delta(spec, name, seed=seed) for seed, name in enumerate((GATE_UP, DOWN, Q_PROJ, ROUTER))}


def dense(delta):
    return delta.scaling * (delta.B.double() @ delta.A.double())


def weight(checkpoint, name):
    """Any weight in fp64, [out, in] for each expert."""
    if name in checkpoint.tensor_specs():
        tensor = checkpoint.tensor(name).double()
        return tensor.transpose(1, 2) if tensor.dim() == 3 else tensor
    return dequantize_mxfp4(checkpoint.tensor(f"{name}_blocks"), checkpoint.tensor(f"{name}_scales"), torch.float64)


@pytest.mark.parametrize("layout", ["mxfp4", "bf16", "original"])
def test_bf16_merge_is_the_rounded_dense_sum(bases, layout, tmp_path):
    base = bases[layout]
    deltas = make_deltas(base.spec)
    merge(base, deltas, tmp_path / "out", format="bf16", progress=False)
    merged = Checkpoint.open(tmp_path / "out")
    assert merged.layout == "bf16"
    for name in weight_shapes(base.spec):
        wanted = weight(base, name) + (dense(deltas[name]) if name in deltas else 0)
        found = weight(merged, name)
        if name in deltas:
            # Half a unit in the last place of bf16, and room for the sum having been in fp32.
            assert ((found - wanted).abs() <= 2.0**-8 * wanted.abs() + 1e-6).all(), name
        else:
            assert torch.equal(found, wanted), name


@pytest.mark.parametrize("layout", ["mxfp4", "original", "bf16"])
def test_mxfp4_merge_is_the_nearest_grid_point_to_the_dense_sum(bases, layout, tmp_path):
    base = bases[layout]
    deltas = make_deltas(base.spec)
    report = merge(base, deltas, tmp_path / "out", format="mxfp4", progress=False)
    merged = Checkpoint.open(tmp_path / "out")
    assert merged.layout == "mxfp4"
    for name in (GATE_UP, DOWN):
        wanted, found = weight(base, name) + dense(deltas[name]), weight(merged, name)
        error = (found - wanted).square().sum()
        for scales in (even_scales(wanted.float()), merged.tensor(f"{name}_scales")):
            rounded = dequantize_mxfp4(quantize_mxfp4(wanted, scales)[0], scales, torch.float64)
            assert error <= (rounded - wanted).square().sum() * (1 + 1e-6), name
        assert torch.equal(found[2], weight(base, name)[2])
        stats, updated = report.updates[name], [e for e in range(base.spec.num_local_experts) if e != 2]
        delta, applied = dense(deltas[name])[updated], (found - weight(base, name))[updated]
        assert stats.retained == pytest.approx(((applied * delta).sum() / delta.square().sum()).item(), rel=1e-4)
        assert stats.relative_error == pytest.approx(((applied - delta).norm() / delta.norm()).item(), rel=1e-4)
        assert 0.1 < stats.changed_share < 1


@pytest.mark.parametrize(("layout", "format"), [("mxfp4", "mxfp4"), ("bf16", "bf16"), ("original", "mxfp4")])
def test_what_has_no_update_keeps_its_bytes(bases, layout, format, tmp_path):
    base = bases[layout]
    delta = make_delta(base.spec, GATE_UP)
    nothing = replace(make_delta(base.spec, DOWN), scaling=0.0)
    report = merge(base, {GATE_UP: delta, DOWN: nothing}, tmp_path / "out", format=format, progress=False)
    merged = Checkpoint.open(tmp_path / "out")
    for name in base.names():
        same = torch.equal(merged.tensor(name), base.tensor(name))
        assert same == (not name.startswith(GATE_UP) or name.endswith("_bias")) or name.endswith("_scales"), name
        if name.startswith(GATE_UP) and not name.endswith("_bias"):
            assert torch.equal(merged.tensor(name)[2], base.tensor(name)[2])
    assert list(report.updates) == [GATE_UP]


@pytest.mark.parametrize(("share", "lost"), [(0.3, False), (0.001, True)])
def test_an_update_that_rounding_loses_is_reported(base, tmp_path, share, lost):
    delta = make_delta(base.spec, GATE_UP, share=share)
    report = merge(base, {GATE_UP: delta}, tmp_path / "out", format="mxfp4", progress=False)
    assert (f"1 of 1 updates are too small for mxfp4 and lost in rounding, first {GATE_UP}" in str(report)) == lost
    assert json.loads(json.dumps(report.to_dict()))["tensors"][GATE_UP]["retained"] == report.updates[GATE_UP].retained


@pytest.mark.parametrize("layout", ["mxfp4", "original"])
def test_the_original_layout_is_what_openai_would_have_written(bases, layout, tmp_path):
    report = merge(bases[layout], {}, tmp_path / "out", format="original", progress=False)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "out" / file).read_bytes() == (bases["original"].path / file).read_bytes()
    assert not report.updates


def test_updates_reach_the_stacked_rows_of_the_original_layout(base, tmp_path):
    deltas = make_deltas(base.spec)
    merge(base, deltas, tmp_path / "mxfp4", format="mxfp4", progress=False)
    merge(base, deltas, tmp_path / "original", format="original", progress=False)
    wanted, found = Checkpoint.open(tmp_path / "mxfp4"), Checkpoint.open(tmp_path / "original")
    assert found.layout == "original"
    for name in wanted.names():
        assert torch.equal(found.tensor(name), wanted.tensor(name)), name
    files = sorted(path.name for path in (tmp_path / "original").iterdir())
    assert files == ["config.json", "manifest.json", "model.safetensors"]


def test_no_update_at_all_is_a_copy(base, tmp_path):
    report = merge(base, {}, tmp_path / "out", format="mxfp4", progress=False)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "out" / file).read_bytes() == (base.path / file).read_bytes()
    assert report.num_copied == len(base.names()) and not report.updates


def test_bf16_weights_on_the_grid_become_the_same_mxfp4_values(bases, tmp_path):
    report = merge(bases["bf16"], {}, tmp_path / "out", format="mxfp4", progress=False)
    merged = Checkpoint.open(tmp_path / "out")
    assert all(torch.equal(weight(merged, name), weight(bases["mxfp4"], name)) for name in (GATE_UP, DOWN))
    assert report.to_dict()["overall"]["rounding_error"] == 0


def test_config_follows_the_format(bases, tmp_path):
    def config(layout, format):
        out = tmp_path / f"{layout}-{format}"
        merge(bases[layout], {}, out, format=format, progress=False)
        return json.loads((out / "config.json").read_text())

    published = bases["mxfp4"].spec.hf_config()
    plain = {key: value for key, value in published.items() if key != "quantization_config"}
    assert config("mxfp4", "bf16") == config("bf16", "bf16") == plain
    assert config("bf16", "mxfp4") == config("mxfp4", "mxfp4") == published
    assert config("original", "mxfp4") == bases["original"].spec.hf_config()
    assert "quantization_config" not in config("original", "bf16")


def test_tokenizer_files_travel_along(base, tmp_path):
    folder = shutil.copytree(base.path, tmp_path / "base")
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        (folder / name).write_text(name)
    merge(Checkpoint.open(folder), {}, tmp_path / "out", format="bf16", progress=False)
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / name).read_text() == name


def test_transformers_opens_both_merges_as_the_updated_model(base, tmp_path):
    from transformers import AutoModelForCausalLM

    deltas = make_deltas(base.spec)
    tokens = torch.arange(50)[None] * 7 % base.spec.vocab_size
    for format in ("bf16", "mxfp4"):
        merge(base, deltas, tmp_path / format, format=format, progress=False)
        merged = Checkpoint.open(tmp_path / format)
        found = AutoModelForCausalLM.from_pretrained(tmp_path / format, dtype=torch.float32)
        wanted = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
        with torch.no_grad():
            for name in weight_shapes(base.spec):
                target = wanted.get_parameter(name)
                value = weight(merged, name).float()
                target.copy_(value.transpose(1, 2) if value.dim() == 3 else value)
            assert torch.equal(found(tokens).logits, wanted(tokens).logits)


def test_bad_updates_are_refused_by_name_and_leave_nothing(base, tmp_path):
    good = make_delta(base.spec, GATE_UP)
    holed = replace(good, B=good.B.clone())
    holed.B[1, 3, 0] = float("nan")
    cases = [
        ({GATE_UP: holed}, f"{GATE_UP} holds NaN"),
        ({Q_PROJ: replace(make_delta(base.spec, Q_PROJ), scaling=float("inf"))}, f"{Q_PROJ} holds NaN or infinite"),
        ({DOWN: good}, f"{DOWN} has A"),
        ({GATE_UP: LowRankDelta(good.B.mT, good.A.mT, 1.0)}, "do not fit"),
        ({"lm_head.weight": good}, "lm_head.weight, which is no adaptable weight"),
    ]
    for deltas, message in cases:
        with pytest.raises(UserError, match=message):
            merge(base, deltas, tmp_path / "out", format="bf16", progress=False)
    assert not list(tmp_path.iterdir())


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ADAPTERS = {
    "attention": dict(target_modules=ATTENTION),
    "everything": dict(target_modules=ATTENTION, target_parameters=[*EXPERTS, "mlp.router.weight"]),
    "gate_up": dict(target_modules=[], target_parameters=EXPERTS[:1]),
    "down": dict(target_modules=[], target_parameters=EXPERTS[1:]),
    "rslora": dict(target_modules=["q_proj"], target_parameters=EXPERTS, use_rslora=True),
    "patterns": dict(
        target_modules=ATTENTION,
        target_parameters=EXPERTS,
        rank_pattern={"mlp.experts.gate_up_proj": 2, r"layers\.1\.self_attn\.o_proj": 3},
        alpha_pattern={"down_proj": 5, "k_proj": 7},
    ),
}


@pytest.fixture
def peft_adapter(bases, tmp_path):
    """A function that saves a random adapter with stock PEFT and returns its folder and the merged parameters."""

    def build(kind):
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(bases["bf16"].path, dtype=torch.float32)
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **ADAPTERS[kind]))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter", dict(model.merge_and_unload().named_parameters())

    return build


# PEFT applies patterns to parameters, yet warns that they match no module.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_mean_what_stock_peft_takes_them_for(bases, peft_adapter, kind):
    folder, merged = peft_adapter(kind)
    base = bases["bf16"]
    deltas = read_adapter(folder, base.spec)
    changed = set()
    for name in weight_shapes(base.spec):
        wanted = merged[name].detach().double()
        wanted = wanted.transpose(1, 2) if wanted.dim() == 3 else wanted
        if not torch.equal(wanted, weight(base, name)):
            changed.add(name)
            assert (weight(base, name) + dense(deltas[name]) - wanted).abs().max() < 1e-6, name
    assert changed == deltas.keys() and changed


def test_an_adapter_from_disk_merges_as_peft_merges(bases, peft_adapter, tmp_path):
    folder, merged = peft_adapter("everything")
    merge(bases["mxfp4"], read_adapter(folder, bases["mxfp4"].spec), tmp_path / "m", format="bf16", progress=False)
    for name, tensor in load_file(tmp_path / "m" / "model.safetensors").items():
        wanted = merged[name].detach()
        assert ((tensor.float() - wanted).abs() <= 2.0**-8 * wanted.abs() + 1e-6).all(), name


def edit(folder, *, config=None, tensors=None):
    if config:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if tensors:
        path = folder / "adapter_model.safetensors"
        save_file(tensors(load_file(path)), path)


def rename(old, new):
    return lambda tensors: {key.replace(old, new): tensor for key, tensor in tensors.items()}


def drop(part):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if part not in key}


def poison(tensors):
    next(tensor for key, tensor in tensors.items() if "router.lora_B" in key)[0, 0] = float("nan")
    return tensors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(config={"peft_type": "IA3"}), "peft_type is 'IA3'"),
        (dict(config={"use_dora": True}), "use_dora=True is more than plain LoRA"),
        (dict(config={"bias": "all"}), "bias='all'"),
        (dict(config={"modules_to_save": ["lm_head"]}), "modules_to_save"),
        (dict(config={"init_lora_weights": "pissa_niter_4"}), "init_lora_weights='pissa_niter_4' may have changed"),
        (dict(config={"use_bdlora": {"nblocks": 2}}), "use_bdlora={'nblocks': 2} is more than plain LoRA"),
        (dict(config={"use_qalora": True}), "use_qalora=True"),
        (dict(config={"of_a_later_peft": 1}), "of_a_later_peft=1"),
        (dict(config={"lora_alpha": "big"}), "lora_alpha missing or no number"),
        (dict(config={"r": 16}), r"has rank 4 where adapter_config\.json says 16"),
        (dict(tensors=rename("q_proj", "qkv_proj")), r"qkv_proj\.lora_A\.weight is no LoRA factor"),
        (dict(tensors=rename("layers.1", "layers.9")), "layers.9.* where the base has no such layer"),
        (dict(tensors=drop("k_proj.lora_B")), "k_proj has only lora_A"),
        (dict(tensors=poison), r"router\.weight holds NaN"),
    ],
)
def test_bad_adapters_are_refused_by_name(bases, peft_adapter, tmp_path, change, message):
    folder, _ = peft_adapter("everything")
    edit(folder, **change)
    with pytest.raises(UserError, match=message):
        export_adapter(folder, tmp_path / "out", bases["mxfp4"])
    assert not (tmp_path / "out").exists()


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("adapter_model.safetensors", truncate, r"adapter_model\.safetensors is truncated or damaged"),
        ("adapter_model.safetensors", lambda file: file.write_bytes(b""), "is truncated or damaged"),
        ("adapter_model.safetensors", lambda file: file.unlink(), r"has no adapter_model\.safetensors"),
        ("adapter_config.json", lambda file: file.unlink(), r"has no adapter_config\.json"),
        ("adapter_config.json", truncate, r"adapter_config\.json is not valid JSON"),
        ("adapter_config.json", lambda file: file.write_bytes(b"\xff"), r"adapter_config\.json is not valid JSON"),
        ("adapter_config.json", lambda file: file.write_text("[]"), "does not hold a JSON object"),
    ],
)
def test_damaged_adapter_files_are_refused_by_name(bases, peft_adapter, tmp_path, name, damage, message):
    folder, _ = peft_adapter("everything")
    damage(folder / name)
    with pytest.raises(UserError, match=message):
        export_adapter(folder, tmp_path / "out", bases["mxfp4"])


def test_an_adapter_of_another_base_is_refused(bases, peft_adapter):
    folder, _ = peft_adapter("everything")
    other = replace(bases["mxfp4"].spec, intermediate_size=128)
    with pytest.raises(UserError, match=r"mlp\.experts(\.base_layer)? has A .* trained on another base"):
        read_adapter(folder, other)


def test_exporting_an_adapter_copies_what_serves_it(bases, peft_adapter, tmp_path):
    folder, _ = peft_adapter("everything")
    (folder / "optimizer.pt").write_text("not needed to serve")
    assert export_adapter(folder, tmp_path / "out", bases["mxfp4"]) == tmp_path / "out"
    copied = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert copied.pop("manifest.json")
    assert copied.keys() == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert all((folder / name).read_bytes() == data for name, data in copied.items())


def test_a_folder_without_adapter_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no adapter_config\.json"):
        read_adapter(tmp_path, SMALL)


def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
    """0.5 GB packed, 1 GB as bf16, within 0.6 GB of what importing takes."""
    script = f"""
import resource
from dataclasses import replace
from pathlib import Path
import torch
from gptoss_ft.export.deltas import LowRankDelta, weight_shapes
from gptoss_ft.export.merge import merge
from gptoss_ft.model.checkpoint import Checkpoint
from gptoss_ft.model.init import init_checkpoint
from gptoss_ft.model.spec import SPECS
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
root = Path({str(tmp_path)!r})
spec = replace(SPECS["gpt_oss_20b"], num_hidden_layers=1, num_local_experts=16, vocab_size=4096)
base = Checkpoint.open(init_checkpoint(spec, root / "base", progress=False))
name = "model.layers.0.mlp.experts.gate_up_proj"
experts, rows, columns = weight_shapes(spec)[name]
delta = LowRankDelta(torch.randn(experts, 4, columns), torch.randn(experts, rows, 4) * 1e-3, 1.0)
delta.B[3:] = 0
before = peak()
for format in ("bf16", "mxfp4", "original", "gguf", "gguf_q8_0"):
    merge(base, {{name: delta}}, root / format, format=format, progress=False)
print((peak() - before) * 1024)
"""
    output = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert int(output) < 0.6e9
