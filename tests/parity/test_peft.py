"""Our expert LoRA against stock PEFT: same names, same shapes, same numbers, in both directions."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GptOssForCausalLM

from gptoss_ft.adapters.attach import Targets, attach_adapters, lora_layers
from gptoss_ft.adapters.save import load_adapter, save_adapter
from gptoss_ft.errors import UserError
from gptoss_ft.model.load import load_base

CASES = {
    "all": {"targets": ["all"]},
    "router too": {"targets": ["all", "router"]},
    "gate_up only": {"targets": ["gate_up_proj"]},
    "down only": {"targets": ["down_proj"]},
    "one layer": {"targets": ["attention", "experts", "router"], "layers": [1]},
    "two experts": {"targets": ["experts"], "experts": [0, 3]},
    "rslora": {"targets": ["all"], "use_rslora": True},
}


def targets(names, *, layers=None, experts=None):
    return Targets.parse(names, num_layers=2, num_experts=4, layers=layers, experts=experts)


def attached(base, case, *, precision="mxfp4"):
    """A base with LoRA whose B is random, so that it has an effect."""
    settings = dict(case)
    rslora = settings.pop("use_rslora", False)
    chosen = targets(settings.pop("targets"), **settings)
    model, _ = attach_adapters(
        load_base(base, precision=precision, dtype=torch.float32), chosen, r=4, alpha=8, use_rslora=rslora
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            B = layer.lora_B["default"].weight
            B.copy_(0.3 * torch.randn(B.shape, generator=generator))
            if getattr(layer, "experts", None) is not None:
                # As training leaves the experts that were not chosen.
                left_out = [e for e in range(4) if e not in layer.experts]
                B.view(B.shape[0], -1, 4)[..., left_out] = 0
    return model.eval()


def stock_base(folder):
    return GptOssForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 500, (2, 30), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits.double()


def distance(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("precision", ["mxfp4", "bf16"])
def test_stock_peft_on_a_stock_base_gives_the_same_logits(small_bases, tmp_path, ids, case, precision):
    model = attached(small_bases["mxfp4"], case, precision=precision)
    folder = save_adapter(model, tmp_path / "adapter")
    base = stock_base(small_bases["bf16"])
    without = logits(base, ids)
    with_peft = logits(PeftModel.from_pretrained(base, folder), ids)
    ours = logits(model, ids)
    assert distance(ours, with_peft) < 1e-5
    assert distance(without, with_peft) > 1e-2, "the adapter must have an effect for this to mean anything"
    with model.disable_adapter():
        assert distance(logits(model, ids), without) < 1e-5


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_we_save_we_load(small_bases, tmp_path, ids, case):
    model = attached(small_bases["mxfp4"], case)
    folder = save_adapter(model, tmp_path / "adapter")
    again, _ = load_adapter(load_base(small_bases["original"], dtype=torch.float32), folder)
    assert torch.equal(logits(again, ids), logits(model, ids))


def test_we_load_what_stock_peft_trained(small_bases, tmp_path, ids):
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        init_lora_weights=False,
    )
    theirs = get_peft_model(stock_base(small_bases["bf16"]), config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    ours, attached = load_adapter(load_base(small_bases["mxfp4"], dtype=torch.float32), tmp_path / "adapter")
    assert set(attached.count_by_target) == {"q_proj", "o_proj", "gate_up_proj", "down_proj"}
    assert distance(logits(ours, ids), logits(theirs, ids)) < 1e-5


def test_saved_names_and_shapes_are_those_of_target_parameters(small_bases, tmp_path):
    model = attached(small_bases["mxfp4"], {"targets": ["experts"]})
    ours = load_file(save_adapter(model, tmp_path / "ours") / "adapter_model.safetensors")
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=[], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    )
    get_peft_model(stock_base(small_bases["bf16"]), config).save_pretrained(tmp_path / "theirs")
    theirs = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert {name: tensor.shape for name, tensor in ours.items()} == {n: t.shape for n, t in theirs.items()}


def test_gradients_equal_stock_peft(small_bases, tmp_path, ids):
    ours = attached(small_bases["mxfp4"], {"targets": ["all"]})
    folder = save_adapter(ours, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(stock_base(small_bases["bf16"]), folder, is_trainable=True)
    gradients = []
    for model in (ours, theirs):
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name in gradients[0]:
        assert distance(gradients[0][name], gradients[1][name]) < 1e-4, name


def test_attach_counts_per_layer_and_kind(small_bases):
    base = load_base(small_bases["mxfp4"])
    _, counted = attach_adapters(base, targets(["all", "router"]), r=4, alpha=8)
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "router", "gate_up_proj", "down_proj")
    assert counted.count_by_target == dict.fromkeys(kinds, 2)
    assert counted.num_layers == 2
    assert counted.num_parameters == sum(p.numel() for p in base.parameters() if p.requires_grad)


def test_attach_fails_when_a_target_is_missing(small_bases):
    base = load_base(small_bases["mxfp4"])
    base.model.layers[1].mlp.experts = torch.nn.Identity()
    with pytest.raises(ValueError):
        attach_adapters(base, targets(["all"]), r=4, alpha=8)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"names": ["w1"]}, "no 'w1'"),
        ({"names": ["all"], "layers": [2]}, "layers 0 to 1"),
        ({"names": ["all"], "experts": [4]}, "experts 0 to 3"),
        ({"names": ["attention"], "experts": [0]}, "names none of them"),
        ({"names": []}, "empty"),
    ],
)
def test_targets_that_the_model_does_not_have_are_named(kwargs, message):
    with pytest.raises(UserError, match=message):
        targets(kwargs.pop("names"), **kwargs)


class TestDamagedAdapters:
    @pytest.fixture
    def adapter(self, small_bases, tmp_path):
        return save_adapter(attached(small_bases["mxfp4"], {"targets": ["all"]}), tmp_path / "adapter")

    def refuse(self, small_bases, adapter, message):
        with pytest.raises(UserError, match=message):
            load_adapter(load_base(small_bases["mxfp4"]), adapter)

    def edit(self, adapter, change):
        state = load_file(adapter / "adapter_model.safetensors")
        change(state)
        save_file(state, adapter / "adapter_model.safetensors")

    def test_cut_short(self, small_bases, adapter):
        path = adapter / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-10])
        self.refuse(small_bases, adapter, "damaged")

    def test_without_a_tensor(self, small_bases, adapter):
        name = "base_model.model.model.layers.0.mlp.experts.lora_A.weight"
        self.edit(adapter, lambda state: state.pop(name))
        self.refuse(small_bases, adapter, f"{name} is missing")

    def test_with_nan(self, small_bases, adapter):
        name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
        self.edit(adapter, lambda state: state[name].fill_(torch.nan))
        self.refuse(small_bases, adapter, f"{name} holds NaN")

    def test_of_another_base(self, small_bases, adapter):
        name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
        self.edit(adapter, lambda state: state.update({name: torch.ones(4, 32)}))
        self.refuse(small_bases, adapter, "another base")

    def test_of_another_model(self, small_bases, adapter):
        self.edit(
            adapter, lambda state: state.update({"base_model.model.model.layers.0.mlp.up.lora_A.weight": torch.ones(1)})
        )
        self.refuse(small_bases, adapter, "layers.0.mlp.up")

    def test_with_dora(self, small_bases, adapter):
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
        self.refuse(small_bases, adapter, "plain LoRA")
