"""Exports opened by transformers, PEFT and OpenAI's reference implementation: good ones pass, damaged ones do not."""

import json
import re
import shutil
import sys
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import gguf
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from gptoss_ft.adapters.attach import Targets, attach_adapters
from gptoss_ft.adapters.save import save_adapter
from gptoss_ft.config.commands import VerifyCommand
from gptoss_ft.config.load import load_command, load_train_config, to_yaml
from gptoss_ft.data.sample import Sample
from gptoss_ft.errors import UserError
from gptoss_ft.export.adapter import export_adapter, read_adapter
from gptoss_ft.export.cures import Limits
from gptoss_ft.export.distance import Distances
from gptoss_ft.export.excerpts import select_positions
from gptoss_ft.export.fingerprint import write_fingerprint
from gptoss_ft.export.gguf_adapter import export_adapter_gguf
from gptoss_ft.export.merge import merge
from gptoss_ft.export.merge_record import Noted, noted_in
from gptoss_ft.export.merged import Rounded
from gptoss_ft.export.verdict import Reading, VerifyReport, WeightCheck
from gptoss_ft.export.verify import check_weights, open_export, verify_export
from gptoss_ft.export.weights import worst_block
from gptoss_ft.model.checkpoint import Checkpoint
from gptoss_ft.model.init import init_checkpoint
from gptoss_ft.model.load import load_base
from gptoss_ft.model.spec import GptOssSpec
from gptoss_ft.mxfp4.round import UpdateStats
from gptoss_ft.recipes import verify as recipe

WIDE = GptOssSpec(
    num_hidden_layers=2,
    num_local_experts=4,
    num_experts_per_tok=2,
    hidden_size=64,
    intermediate_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=300,
    eos_token_id=1,
    pad_token_id=0,
)
DEEP = replace(
    WIDE, num_hidden_layers=3, num_local_experts=6, num_experts_per_tok=4, hidden_size=128, intermediate_size=32
)
SHAPES = {"wide": WIDE, "deep": DEEP}
FORMATS = ("adapter", "adapter_gguf", "bf16", "mxfp4", "original", "gguf", "gguf_q8_0")
MODULES = {
    "peft": "peft",
    "transformers": "transformers",
    "gpt-oss": "gpt_oss",
    "gptoss-ft": "gptoss_ft",
    "llama-cpp-python": "llama_cpp",
}
READERS = {
    "adapter": ["peft"],
    "original": ["gpt-oss", "gptoss-ft"],
    **{format: ["transformers", "gpt-oss", "gptoss-ft"] for format in ("bf16", "mxfp4")},
    **{format: ["llama-cpp-python"] for format in ("adapter_gguf", "gguf", "gguf_q8_0")},
}


@dataclass
class Trained:
    """A base, an adapter trained on it, and rows."""

    base: Path
    adapter: Path
    samples: list[Sample]

    def verify(self, export, **changed):
        paths = {"base": self.base, "adapter": self.adapter, "samples": self.samples, "max_tokens": 64}
        return verify_export(export=export, **{**paths, **changed})

    def export(self, format, out):
        base = Checkpoint.open(self.base)
        if format == "adapter":
            export_adapter(self.adapter, out, base)
        elif format == "adapter_gguf":
            export_adapter_gguf(self.adapter, out, base, progress=False)
        else:
            merge(base, read_adapter(self.adapter, base.spec), out, format=format, progress=False)
        return out


def rows(vocab_size=300):
    """Random tokens, of which the second half carries loss."""
    ids = torch.randint(2, vocab_size, (3, 40), generator=torch.Generator().manual_seed(0)).tolist()
    return [
        Sample(row, [0.0] * 20 + [1.0] * (len(row) - 20), f"rows.jsonl:{number}", 0)
        for number, row in enumerate(ids, 1)
    ]


def train(folder, base, spec, targets=("all", "router"), *, steps=4):
    """A few steps towards memorising the rows."""
    torch.manual_seed(0)
    names = Targets.parse(targets, num_layers=spec.num_hidden_layers, num_experts=spec.num_local_experts)
    precision = "bf16" if Checkpoint.open(base).layout == "bf16" else "mxfp4"
    model, _ = attach_adapters(load_base(base, precision=precision, dtype=torch.float32), names, r=4, alpha=8)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    samples = rows(spec.vocab_size)
    ids, labels = (torch.tensor([getattr(sample, name) for sample in samples]) for name in ("input_ids", "labels"))
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    save_adapter(model, folder / "trained")
    return Trained(base, folder / "trained", samples)


def trained_on(tmp_path, spec=WIDE, *, layout="mxfp4", **options):
    init_checkpoint(spec, tmp_path / "base", layout=layout, progress=False)
    return train(tmp_path, tmp_path / "base", spec, **options)


@pytest.fixture(scope="module", params=SHAPES)
def shape(request, tmp_path_factory):
    return trained_on(tmp_path_factory.mktemp(request.param), SHAPES[request.param])


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return trained_on(tmp_path_factory.mktemp("wide"))


@pytest.fixture(scope="module")
def exports(wide, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    return {format: wide.export(format, folder / format) for format in FORMATS}


@pytest.mark.parametrize("format", FORMATS)
def test_good_exports_pass(shape, tmp_path, format):
    report = shape.verify(shape.export(format, tmp_path / "out"))

    programs = [program for program in READERS[format] if find_spec(MODULES[program])]
    assert [reading.program.split()[0] for reading in report.readings] == programs
    assert report.verdict == ("PASSED" if programs not in ([], ["gptoss-ft"]) else "NOT VERIFIED"), str(report)
    assert not report.weights.outside
    assert report.format == format
    assert len(report.places) == report.base.kl_nats.numel() == 60
    for reading in report.readings:
        lost = reading.from_trained.kl_nats.median() / report.base.kl_nats.median()
        assert lost < {"adapter": 1e-9, "adapter_gguf": 0.001, "bf16": 0.005}.get(format, 0.5)


@pytest.mark.parametrize("layout", ["original", "bf16"])
def test_every_base_layout_can_be_verified(tmp_path, layout):
    trained = trained_on(tmp_path, layout=layout)
    for format in FORMATS:
        report = trained.verify(trained.export(format, tmp_path / format))
        assert report.verdict in ("PASSED", "NOT VERIFIED"), str(report)
        assert report.passed or format not in ("adapter", "bf16", "mxfp4"), str(report)


def gate_up(layer=1):
    return f"model.layers.{layer}.mlp.experts.gate_up_proj"


def swap_rows(tensors):
    blocks = tensors[f"{gate_up()}_blocks"]
    blocks[2, [10, 12]] = blocks[2, [12, 10]]


def swap_gate_and_up(tensors):
    for part in ("blocks", "scales"):
        packed = tensors[f"{gate_up()}_{part}"]
        tensors[f"{gate_up()}_{part}"] = packed.unflatten(1, (-1, 2)).flip(2).flatten(1, 2)


def halves_instead_of_interleaved(tensors):
    for part in ("blocks", "scales"):
        packed = tensors[f"{gate_up()}_{part}"]
        tensors[f"{gate_up()}_{part}"] = torch.cat((packed[:, 0::2], packed[:, 1::2]), dim=1)


def zero_scale(tensors):
    tensors[f"{gate_up()}_scales"][3, 5, 1] = 0


def nan_scale(tensors):
    tensors[f"{gate_up()}_scales"][0, 0, 0] = 255


def swap_nibbles(tensors):
    blocks = tensors[f"{gate_up()}_blocks"]
    tensors[f"{gate_up()}_blocks"] = (blocks << 4) | (blocks >> 4)


def swap_experts(tensors):
    for part in ("blocks", "scales"):
        packed = tensors[f"{gate_up()}_{part}"]
        packed[[0, 1]] = packed[[1, 0]]


def sinks(tensors):
    tensors["model.layers.0.self_attn.sinks"] += 1


def head_row(tensors):
    tensors["lm_head.weight"][7] *= 2


def transposed_output(tensors):
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors[name] = tensors[name].T.reshape(tensors[name].shape)


def swap_bf16_columns(tensors):
    weight = tensors[gate_up()]
    weight[1][:, [4, 6]] = weight[1][:, [6, 4]]


def transposed_bf16(tensors):
    tensors[gate_up()] = tensors[gate_up()].transpose(1, 2).reshape(tensors[gate_up()].shape)


def truncated_bf16(tensors):
    # Rounding towards zero instead of to nearest: the error is at most twice what it should be.
    tensors[gate_up()] = (tensors[gate_up()].view(torch.int16) - 1).view(torch.bfloat16)


DAMAGES = [
    *(("mxfp4", damage) for damage in (swap_rows, swap_gate_and_up, halves_instead_of_interleaved, zero_scale)),
    *(("mxfp4", damage) for damage in (nan_scale, swap_nibbles, swap_experts, sinks, head_row, transposed_output)),
    *(("bf16", damage) for damage in (swap_bf16_columns, transposed_bf16, truncated_bf16, sinks, transposed_output)),
]


def damaged(exports, format, damage, out):
    shutil.copytree(exports[format], out)
    file = out / ("adapter_model.safetensors" if format == "adapter" else "model.safetensors")
    if not file.exists():
        (file,) = out.glob("*.safetensors")
    tensors = load_file(file)
    damage(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    # Else its hash would tell before anything is compared.
    (out / "manifest.json").unlink()
    return out


@pytest.mark.parametrize(("format", "damage"), DAMAGES, ids=lambda value: getattr(value, "__name__", value))
def test_damaged_weights_fail(wide, exports, tmp_path, format, damage):
    report = wide.verify(damaged(exports, format, damage, tmp_path / "out"))

    assert not report.passed
    assert any(
        "weights are not what was trained; model.layers." in line or "lm_head" in line for line in report.failures
    )
    json.dumps(report.to_dict(), allow_nan=False)


def test_one_flipped_sign_in_a_copied_expert_fails(tmp_path):
    trained = trained_on(tmp_path, targets=["attention"])
    exports = {"mxfp4": trained.export("mxfp4", tmp_path / "good")}
    blocks = f"{gate_up(0)}_blocks"

    def flip(tensors):
        byte = tensors[blocks][1, 7].flatten().nonzero()[0]  # an element of a byte that is not two zeros
        tensors[blocks][1, 7].view(-1)[byte] ^= 0x88

    report = trained.verify(damaged(exports, "mxfp4", flip, tmp_path / "bad"))
    assert not report.passed
    assert f"{gate_up(0)}, expert 1 is off" in report.failures[0]


class OneExpert:
    """A calibration that makes all numbers and the bias of one expert one, of a key's and a router's weight others."""

    corrected_weight, router = "model.layers.1.self_attn.k_proj.weight", "model.layers.1.mlp.router.weight"

    def __init__(self, base):
        self.base, self.few_inputs, self.limits = base, {}, Limits()

    def corrected(self, name):
        return self.base.read(name) + 0.5 if name in (self.corrected_weight, self.router) else None

    def __call__(self, name, expert, update, _):
        if (name, expert) != (gate_up(), 2):
            return None
        return Rounded(torch.full_like(update.blocks, 0x22), update.scales, update.bias + 1, UpdateStats())

    def written(self, *_):
        pass


def test_calibrated_experts_are_known_by_what_was_written(wide, tmp_path):
    """No block is near its target, and still one changed code or bias is found."""
    base = Checkpoint.open(wide.base)
    deltas, out = read_adapter(wide.adapter, base.spec), tmp_path / "mxfp4"
    calibrate, key, router = OneExpert(base), OneExpert.corrected_weight, OneExpert.router
    report = merge(base, deltas, out, format="mxfp4", calibrate=calibrate, progress=False)
    # What the record says of a corrected weight is of what was written.
    up, down = deltas[key].factors()
    update = deltas[key].scaling * up.float() @ down.float()
    assert report.updates[key].relative_error == pytest.approx(float((0.5 - update).norm() / update.norm()), rel=0.02)
    assert list(report.calibrated) == [gate_up()] and list(report.calibrated[gate_up()]) == [2]
    bias = f"{gate_up()}_bias"
    written, before = (checkpoint.tensor(bias) for checkpoint in (Checkpoint.open(out), base))
    assert torch.equal(written[2], before[2] + 1) and torch.equal(written[:2], before[:2])
    # Nothing says that these are so on purpose.
    assert {d.place for d in wide.verify(out).weights.outside} == {f"{gate_up()}, expert 2", bias, key, router}
    (out / "merge.json").write_text(json.dumps(report.to_dict()))
    verified = wide.verify(out)
    assert not verified.weights.outside and verified.weights.worst["calibrated"].worst > 0.4
    assert "known by hash" in str(verified)

    for number, (name, damage) in enumerate([(f"{gate_up()}_blocks", 1), (bias, 2**-6), (key, 2**-6), (router, 2**-6)]):

        def change(tensors, name=name, damage=damage):
            flat = tensors[name][2].view(-1)
            flat[0] = flat[0] ^ damage if name.endswith("_blocks") else flat[0] + damage

        altered = wide.verify(damaged({"mxfp4": out}, "mxfp4", change, tmp_path / f"damaged{number}"))
        assert "merge.json has another hash of what was written" in altered.failures[0]

    # The other formats hold the same.
    for format in ("original", "gguf", "gguf_q8_0"):
        again = merge(base, deltas, tmp_path / format, format=format, calibrate=calibrate, progress=False)
        assert again.calibrated == report.calibrated and again.corrected.keys() == report.corrected.keys()
        # In 8 bits it is another one.
        assert (again.corrected == report.corrected) == (format != "gguf_q8_0")
        _, contents = open_export(base, tmp_path / format)
        noted = Noted(noted_in(out).experts, again.corrected)
        assert not check_weights(base, deltas, contents, noted).outside
        outside = [w.place for w in check_weights(base, deltas, contents, Noted(noted.experts)).outside]
        assert {bias, key, router} <= {*outside}
    flip_byte(tmp_path / "gguf_q8_0" / "model.gguf", "blk.1.attn_k.weight", 3)
    _, contents = open_export(base, tmp_path / "gguf_q8_0")
    assert [w.place for w in check_weights(base, deltas, contents, noted).outside] == [key]
    noted = noted_in(out)
    # GGUF's are fp32: one that is not what bf16 can hold was not written so.
    flip_byte(tmp_path / "gguf" / "model.gguf", "blk.1.ffn_gate_exps.bias", 0)
    _, contents = open_export(base, tmp_path / "gguf")
    assert [w.place for w in check_weights(base, deltas, contents, noted).outside] == [bias]


def flip_byte(file, tensor, number):
    """Damage one byte of a tensor in a GGUF file."""
    (found,) = [found for found in gguf.GGUFReader(file).tensors if found.name == tensor]
    content = bytearray(file.read_bytes())
    content[found.data_offset + number] ^= 0x40
    file.write_bytes(content)
    (file.parent / "manifest.json").unlink()


@pytest.mark.parametrize("format", ["gguf", "gguf_q8_0"])
@pytest.mark.parametrize("tensor", ["blk.1.ffn_up_exps.weight", "token_embd.weight", "blk.0.attn_sinks.weight"])
def test_one_damaged_byte_of_a_gguf_file_fails(tmp_path, format, tensor):
    trained = trained_on(tmp_path, targets=["attention"])
    export = trained.export(format, tmp_path / "out")
    flip_byte(export / "model.gguf", tensor, 3)
    report = trained.verify(export)
    assert report.verdict == "FAILED"
    assert [distance.worst > 0 for distance in report.weights.outside] == [True]


def test_one_damaged_byte_of_a_gguf_adapter_fails(wide, exports, tmp_path):
    export = shutil.copytree(exports["adapter_gguf"], tmp_path / "out")
    flip_byte(export / "adapter.gguf", "blk.1.ffn_up_exps.weight.lora_b", 3)
    report = wide.verify(export)
    assert report.verdict == "FAILED" and "layers.1.mlp.experts.gate_up_proj" in report.failures[0]


@pytest.mark.parametrize("format", FORMATS)
def test_a_changed_or_shortened_file_is_named_by_its_hash(wide, exports, tmp_path, format):
    for path in exports[format].iterdir():
        if path.name == "manifest.json":
            continue
        export = shutil.copytree(exports[format], tmp_path / path.name)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        (export / path.name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{re.escape(path.name)} has another sha256 than in manifest\.json"):
            wide.verify(export)
        (export / path.name).write_bytes(content[:-1])
        with pytest.raises(UserError, match=rf"{re.escape(path.name)} has {len(content) - 1} bytes where manifest"):
            wide.verify(export)


def swap_adapter_rows(tensors):
    name = next(name for name in tensors if "layers.1.mlp.experts.lora_A" in name)
    tensors[name][[0, 5]] = tensors[name][[5, 0]]


def swap_gate_and_up_of_adapter(tensors):
    name = next(name for name in tensors if "layers.1.mlp.experts.base_layer.lora_B" in name)
    tensors[name] = tensors[name].unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


@pytest.mark.parametrize("damage", [swap_adapter_rows, swap_gate_and_up_of_adapter])
def test_damaged_adapters_fail(wide, exports, tmp_path, damage):
    report = wide.verify(damaged(exports, "adapter", damage, tmp_path / "out"))
    assert len(report.failures) == 2  # by weights, and by what PEFT computes
    assert "layers.1.mlp.experts" in report.failures[0]
    assert report.failures[1].startswith("peft")


def test_a_rescaled_adapter_passes_and_another_scale_fails(wide, exports, tmp_path):
    def double_alpha(folder):
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 2 * config["lora_alpha"]}))
        return folder

    def halve(tensors):
        for name in tensors:
            if "lora_B" in name:
                tensors[name] /= 2

    same = double_alpha(damaged(exports, "adapter", halve, tmp_path / "same"))
    assert wide.verify(same).passed
    twice = double_alpha(damaged(exports, "adapter", lambda tensors: None, tmp_path / "twice"))
    assert not wide.verify(twice).passed


def test_the_export_of_another_run_fails(wide, tmp_path):
    other = train(tmp_path, wide.base, WIDE, steps=8)
    report = wide.verify(other.export("bf16", tmp_path / "out"))
    assert not report.passed


@pytest.mark.parametrize("layout", ["mxfp4", "bf16"])
def test_training_lost_to_rounding_fails_and_names_the_cure(tmp_path, layout):
    trained = trained_on(tmp_path, targets=["experts"], steps=1, layout=layout)
    report = trained.verify(trained.export("mxfp4", tmp_path / "out"))
    assert not report.weights.outside
    assert len(report.failures) == 1
    assert "format=adapter" in report.failures[0]
    assert ("rounding=dithered" in report.failures[0]) == (layout == "mxfp4")
    assert ("base=FOLDER" in report.failures[0]) == (layout == "bf16")
    assert trained.verify(trained.export("bf16", tmp_path / "bf16")).passed


def test_an_adapter_without_effect_passes_with_a_note(tmp_path):
    trained = trained_on(tmp_path, steps=0)
    for format in FORMATS:
        report = trained.verify(trained.export(format, tmp_path / format))
        assert report.verdict in ("PASSED", "NOT VERIFIED"), str(report)
        assert not report.weights.outside
        assert "changes nothing" in report.notes[0]
        if format in ("adapter", "bf16", "mxfp4"):
            assert float(report.readings[0].from_trained.relative.max()) < 1e-5


def test_without_llama_cpp_its_formats_are_not_verified(wide, exports, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    for format in ("gguf", "adapter_gguf"):
        report = wide.verify(exports[format])
        assert report.verdict == "NOT VERIFIED" and not report.weights.outside
        assert "pip install llama-cpp-python" in report.not_run["llama-cpp-python"]


def test_programs_that_are_not_installed_are_named(wide, exports, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "gpt_oss"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gpt_oss", None)
    report = wide.verify(exports["bf16"])
    assert report.passed
    assert "pip install" in report.not_run["gpt-oss"]
    assert "not run: gpt-oss" in str(report)


def test_nothing_passes_that_no_other_program_opened(wide, exports, tmp_path, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    report = wide.verify(exports["mxfp4"])
    assert not report.passed
    assert report.verdict == "NOT VERIFIED"
    (failure,) = report.failures
    assert failure.startswith("not verified: no other program opened it here (transformers: it needs 0.0 GB of memory")
    assert "NOT VERIFIED" in str(report) and "failed:" not in str(report)

    worse = wide.verify(damaged(exports, "mxfp4", swap_rows, tmp_path / "out"))
    assert worse.verdict == "FAILED"
    assert "failed: 1 of" in str(worse) and failure in str(worse)


def test_a_dense_model_is_only_opened_where_it_fits(tmp_path, monkeypatch):
    trained = trained_on(tmp_path, layout="bf16")
    export = trained.export("bf16", tmp_path / "out")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(UserError, match=r"not verified: the trained model cannot be opened here: it needs .* GB"):
        trained.verify(export)


def test_every_program_shows_its_progress(wide, exports, capsys):
    wide.verify(exports["bf16"])
    shown = capsys.readouterr().err
    for stage in ("comparing the files", "reading with the trained model", "reading with transformers"):
        assert stage in shown
    wide.verify(exports["bf16"], progress=False)
    assert "with" not in capsys.readouterr().err


def test_folders_that_are_no_export_of_the_run_are_named(wide, exports, tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        wide.verify(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty has no config\.json"):
        wide.verify(tmp_path / "empty")
    init_checkpoint(DEEP, tmp_path / "deep", progress=False)
    with pytest.raises(UserError, match="num_hidden_layers is 3, but the base has 2"):
        wide.verify(tmp_path / "deep")
    name = "model.layers.0.self_attn.o_proj.bias"
    short = damaged(exports, "bf16", lambda tensors: tensors.pop(name), tmp_path / "short")
    with pytest.raises(UserError, match=name):
        wide.verify(short)


@pytest.mark.parametrize("manifest", [True, False], ids=["manifest", "no_manifest"])
@pytest.mark.parametrize("format", FORMATS)
def test_a_truncated_file_is_named(wide, exports, tmp_path, format, manifest):
    export = shutil.copytree(exports[format], tmp_path / "out")
    file = max(export.iterdir(), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-100])
    if not manifest:
        (export / "manifest.json").unlink()
    with pytest.raises(UserError, match=re.escape(str(file))):
        wide.verify(export)


def test_a_stale_shard_fails(wide, exports, tmp_path):
    """Half of the tensors are of another run's export, whose shapes are the same."""
    other = train(tmp_path, wide.base, WIDE, steps=8).export("mxfp4", tmp_path / "other")
    out = tmp_path / "out"
    shutil.copytree(exports["mxfp4"], out, ignore=shutil.ignore_patterns("manifest.json", "*.safetensors"))
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (exports["mxfp4"], other))
    shards = {f"model-0000{number}-of-00001.safetensors": number for number in (0, 1)}
    weight_map = {}
    for file, number in shards.items():
        part = {name: tensor for name, tensor in (ours, theirs)[number].items() if (".layers.1." in name) == number}
        save_file(part, out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    report = wide.verify(out)
    assert report.verdict == "FAILED"
    assert {distance.name.split(".")[2] for distance in report.weights.outside} == {"1"}


def test_missing_and_foreign_tokenizers_are_named(wide, exports, tmp_path):
    base, export = (shutil.copytree(folder, tmp_path / folder.name) for folder in (wide.base, exports["mxfp4"]))
    (base / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        wide.verify(export, base=base)
    (export / "tokenizer.json").write_text('{"other": 1}')
    with pytest.raises(UserError, match=r"tokenizer\.json is not the base's"):
        wide.verify(export, base=base)


def test_positions_are_those_before_the_tokens_with_loss():
    first = Sample([5, 6, 7, 8], [0.0, 1.0, 0.0, 1.0], "rows.jsonl:1", 0)
    second = Sample([9, 9, 9], [1.0, 1.0, 1.0], "rows.jsonl:2", 1)
    silent = Sample([1, 2], [0.0, 0.0], "rows.jsonl:3", 0)

    (one,) = select_positions([silent, first], 100)
    assert one.input_ids_T.tolist() == [5, 6, 7]
    assert one.positions_P.tolist() == [0, 2]
    assert one.places == ["rows.jsonl:1 generation 0 token 1", "rows.jsonl:1 generation 0 token 3"]
    # The first token of a sequence is predicted by nothing.
    one, two = select_positions([first, second], 3)
    assert two.positions_P.tolist() == [0]
    assert two.input_ids_T.tolist() == [9]
    with pytest.raises(UserError, match="carries loss"):
        select_positions([silent], 10)


def test_distances_by_hand():
    wanted = torch.tensor([[0.0, 2.0], [1.0, 1.0 + 1e-6]])
    logits = torch.tensor([[2.0, 0.0], [float("nan"), 0.0]])
    found = Distances.between(wanted, logits)
    p = torch.tensor([0.0, 2.0]).double().softmax(-1)
    assert float(found.kl_nats[0]) == pytest.approx(float(2 * (p[1] - p[0])), rel=1e-12)
    assert float(found.relative[0]) == pytest.approx(2.0)
    assert found.same_top.tolist() == [False, False]
    assert found.kl_nats[1] == found.relative[1] == torch.inf


def test_worst_block_by_hand():
    wanted = torch.ones(2, 70)
    found = wanted.clone()
    found[1, 69] = 3.0  # in a remainder of six columns
    assert worst_block(wanted, found) == pytest.approx(2 / 6**0.5)
    assert worst_block(torch.zeros(1, 32), torch.ones(1, 32)) == torch.inf
    assert worst_block(wanted, found.fill_(float("nan"))) == torch.inf


def test_readers_that_disagree_fail():
    def distances(relative):
        values = torch.full((20,), relative, dtype=torch.float64)
        return Distances(values, values, torch.ones(20, dtype=torch.bool))

    other = Reading("gpt-oss 0.0.9", False, distances(0.002), distances(0.001))
    report = VerifyReport(
        export=Path("out"),
        format="bf16",
        places=["row"] * 20,
        base=distances(0.5),
        readings=[Reading("transformers 5.23.0", False, distances(0.001)), other],
        not_run={},
        weights=WeightCheck.of([]),
        cure="",
    )
    assert ["gpt-oss 0.0.9 and transformers 5.23.0 differ" in line for line in report.failures] == [True]
    assert replace(report, readings=[report.readings[0], replace(other, from_first=distances(1e-6))]).passed


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder as training leaves it, over the real vocabulary."""
    folder = tmp_path_factory.mktemp("run")
    spec = replace(WIDE, hidden_size=32, intermediate_size=64, vocab_size=201088)
    trained = trained_on(folder, spec, targets=["attention"])
    trained.adapter.rename(folder / "adapter")
    trained.adapter = folder / "adapter"
    messages = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4", "thinking": "Four."}]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"messages": messages}) + "\n" for _ in range(3)))
    words = [f"run.dir={folder}", f"model.path={trained.base}", f"data.path={folder / 'rows.jsonl'}"]
    (folder / "config.yaml").write_text(to_yaml(load_train_config([*words, "data.eval_fraction=0.3"])))
    trained.export("mxfp4", folder / "export" / "mxfp4")
    return folder


def test_the_command_prints_and_records_its_verdict(run, capsys):
    words = [f"run={run}", f"path={run / 'export' / 'mxfp4'}", "max_tokens=6"]
    assert recipe.main(load_command(VerifyCommand, words)) is True

    assert "PASSED" in capsys.readouterr().out
    recorded = json.loads((run / "verify-mxfp4.json").read_text())
    assert recorded["passed"] is True
    assert len(recorded["positions"]["place"]) == 6
    assert "rows.jsonl:" in recorded["positions"]["place"][0]


def test_the_command_takes_other_rows(run, capsys):
    (run / "other.jsonl").write_text((run / "rows.jsonl").read_text())
    words = [f"run={run}", f"path={run / 'export' / 'mxfp4'}", f"data={run / 'other.jsonl'}", "max_tokens=2"]
    assert recipe.main(load_command(VerifyCommand, words)) is True
    assert "other.jsonl:1" in capsys.readouterr().out


def test_rows_and_base_may_have_moved(run, tmp_path):
    moved = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("rows.jsonl", "base", "verify-*"))
    config = (run / "config.yaml").read_text()
    (moved / "config.yaml").write_text(config.replace(str(run), str(tmp_path / "gone")))
    export = moved / "export" / "mxfp4"

    with pytest.raises(UserError, match=r"gone.base is no folder"):
        recipe.verify_run(moved, export)
    with pytest.raises(UserError, match=r"gone.rows\.jsonl: no such file; .* data=FILE"):
        recipe.verify_run(moved, export, base=run / "base")
    assert recipe.verify_run(moved, export, base=run / "base", data=run / "rows.jsonl", max_tokens=2).passed


def test_only_the_rows_held_out_need_to_be_there(run, tmp_path):
    moved = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("base", "verify-*"))
    config = (run / "config.yaml").read_text().replace("eval_fraction: 0.3", "eval_fraction: 0")
    config = config.replace("eval_path: null", f"eval_path: [{moved / 'rows.jsonl'}]")
    (moved / "config.yaml").write_text(config.replace(str(run / "rows.jsonl"), str(tmp_path / "gone.jsonl")))
    report = recipe.verify_run(moved, moved / "export" / "mxfp4", max_tokens=2)
    assert report.passed and str(moved / "rows.jsonl") in report.places[0]


def test_another_base_is_refused(run, tmp_path):
    moved = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("base", "verify-*"))
    write_fingerprint(moved, Checkpoint.open(run / "base"))
    other = init_checkpoint(Checkpoint.open(run / "base").spec, tmp_path / "other", seed=1, progress=False)
    with pytest.raises(UserError, match=r"other is not the base that .* trained on: .* base=FOLDER"):
        recipe.verify_run(moved, moved / "export" / "mxfp4", base=other)


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(UserError, match="not the folder of a training run"):
        recipe.verify_run(tmp_path, tmp_path)
