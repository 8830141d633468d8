"""`gptoss-ft export` from a run folder: the right base, records that stay apart, damaged files named."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptoss_ft.cli import main
from gptoss_ft.config.load import compose_train_config
from gptoss_ft.data.sample import Sample
from gptoss_ft.errors import UserError
from gptoss_ft.export.adapter import read_adapter
from gptoss_ft.export.distance import quantile
from gptoss_ft.export.fingerprint import base_fingerprint, check_fingerprint, write_fingerprint
from gptoss_ft.export.gguf_layout import q8_0_weights
from gptoss_ft.export.merge_record import Noted, check_dithered, noted_in
from gptoss_ft.export.verify import check_weights, open_export
from gptoss_ft.export.weights import expert_weight
from gptoss_ft.files import partial_of
from gptoss_ft.kernels.merging import DITHER_RULE, merge_mxfp4, merge_mxfp4_dithered
from gptoss_ft.kernels.reference import MXFP4Weight, dequantize_mxfp4
from gptoss_ft.model.checkpoint import Checkpoint
from gptoss_ft.model.init import init_checkpoint
from gptoss_ft.recipes.export import (
    Calibrated,
    calibration,
    calibration_samples,
    export_run,
    record_path,
    rounding_key,
    token_weights,
)
from gptoss_ft.recipes.samples import split_samples
from gptoss_ft.recipes.verify import verify_run
from gptoss_ft.training.run_folder import RunFolder


def test_the_base_may_move_but_not_change(run, small_spec, small_bases, tmp_path, capsys):
    words = ["export", f"run={run}", "format=bf16", "fidelity_tokens=0"]
    write_fingerprint(run, Checkpoint.open(small_bases["mxfp4"]))
    assert json.loads((run / "base.json").read_text())["path"] == str(small_bases["mxfp4"])
    moved = shutil.copytree(small_bases["mxfp4"], tmp_path / "moved")
    assert main([*words, f"out={tmp_path / 'good'}", f"base={moved}"]) == 0

    other = init_checkpoint(small_spec, tmp_path / "other", seed=2, progress=False)
    assert main([*words, f"out={tmp_path / 'bad'}", f"base={other}"]) == 1
    assert f"{other} is not the base that {run} trained on" in capsys.readouterr().err
    assert not (tmp_path / "bad").exists()


def test_the_fingerprint_is_of_the_model_not_of_its_files(small_spec, small_bases, tmp_path):
    fingerprints = {base_fingerprint(Checkpoint.open(folder)) for folder in small_bases.values()}
    assert len(fingerprints) == 1
    longer = init_checkpoint(replace(small_spec, sliding_window=16), tmp_path / "longer", seed=1, progress=False)
    assert base_fingerprint(Checkpoint.open(longer)) not in fingerprints


@pytest.mark.parametrize(
    "name", ["lm_head.weight", "model.layers.1.self_attn.sinks", "model.layers.1.mlp.experts.down_proj_scales"]
)
def test_every_tensor_counts(small_bases, tmp_path, name):
    changed = shutil.copytree(small_bases["mxfp4"], tmp_path / "changed")
    (file,) = changed.glob("*.safetensors")
    tensors = load_file(file)
    tensors[name][-1 if "experts" in name else 0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    fingerprint = base_fingerprint(Checkpoint.open(changed))
    assert fingerprint != base_fingerprint(Checkpoint.open(small_bases["mxfp4"]))


def test_a_damaged_record_of_the_base_is_named(run, small_bases):
    (run / "base.json").write_text("{}")
    with pytest.raises(UserError, match=r"base\.json is damaged"):
        check_fingerprint(run, Checkpoint.open(small_bases["mxfp4"]))


def test_no_export_overwrites_the_record_of_another(run, tmp_path):
    outs = [run / "export" / "bf16", tmp_path / "a" / "merged", tmp_path / "b" / "merged"]
    for out in outs:
        export_run(run, "bf16", out)
    records = sorted(path.name for path in run.glob("merge-*.json"))
    assert len(records) == 3 and records[-1] == "merge-bf16.json"
    assert all(name.startswith("merge-bf16-merged-") for name in records[:2])


def test_a_folder_has_one_record_however_it_is_spelled(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    there = [record_path(RunFolder(run), "verify", "mxfp4", path) for path in (tmp_path / "x", (tmp_path / "run/../x"))]
    assert len(set(there)) == 1
    assert record_path(RunFolder("run"), "verify", "mxfp4", run / "export" / "mxfp4").name == "verify-mxfp4.json"


@pytest.mark.parametrize(
    ("format", "files"),
    [
        ("adapter_vllm", ["adapter_config.json", "adapter_model.safetensors"]),
        ("adapter_sglang", ["adapter_config.json", "adapter_model.safetensors"]),
        ("adapter_gguf", ["adapter.gguf"]),
        ("original", ["config.json", "merge.json", "model.safetensors"]),
        ("gguf", ["merge.json", "model.gguf"]),
        ("gguf_q8_0", ["merge.json", "model.gguf"]),
    ],
)
def test_a_format_is_its_files_and_its_record(run, tmp_path, format, files, capsys):
    assert main(["export", f"run={run}", f"format={format}", f"out={tmp_path / 'out'}", "fidelity_tokens=0"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([*files, "manifest.json"])
    printed = capsys.readouterr().out
    assert "written anew" in printed or format.startswith("adapter")
    assert ("--enable-lora --max-lora-rank 8" in printed) == (format == "adapter_vllm")
    records = [json.loads(path.read_text()) for path in run.glob("merge-*.json")]
    assert [record["format"] for record in records] == ([] if format.startswith("adapter") else [format])


@pytest.mark.parametrize("format", ["adapter", "adapter_vllm", "adapter_sglang", "adapter_gguf", "mxfp4", "gguf"])
def test_a_truncated_adapter_is_an_error_of_one_line(run, tmp_path, capsys, format):
    weights = run / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    assert main(["export", f"run={run}", f"format={format}", f"out={tmp_path / 'out'}"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {weights} is truncated or damaged") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", ["mxfp4", "original", "gguf", "gguf_q8_0"])
@pytest.mark.parametrize("layout", ["mxfp4", "original"])
def test_a_dithered_export_has_the_bits_that_merge_aware_training_computes_with(
    run, small_bases, tmp_path, format, layout, capsys
):
    base, out = Checkpoint.open(small_bases[layout]), tmp_path / "out"
    words = [f"run={run}", f"format={format}", "rounding=dithered", f"base={base.path}", f"out={out}"]
    assert not (tmp_path / "rows.jsonl").exists()  # nothing is calibrated
    assert main(["export", *words, "fidelity_tokens=0"]) == 0
    assert "4 weights of experts are dithered" in (printed := capsys.readouterr().out) and "lost" not in printed
    deltas = read_adapter(run / "adapter", base.spec)
    _, exported = open_export(base, out)
    for layer in range(base.spec.num_hidden_layers):
        for projection in ("gate_up_proj", "down_proj"):
            name = f"model.layers.{layer}.mlp.experts.{projection}"
            packed = MXFP4Weight(*(base.tensor(f"{name}_{part}") for part in ("blocks", "scales")))
            dithered = merge_mxfp4_dithered(packed, deltas[name].A, deltas[name].B, deltas[name].scaling)
            nearest = merge_mxfp4(packed, deltas[name].A, deltas[name].B, deltas[name].scaling)
            for expert in range(base.spec.num_local_experts):
                found = expert_weight(exported, name, expert)
                assert torch.equal(found, dequantize_mxfp4(*(part[expert] for part in dithered), torch.float32))
                assert not torch.equal(found, dequantize_mxfp4(*(part[expert] for part in nearest), torch.float32))

    # The record says by which rule, so that every number can be compared.
    noted = noted_in(out)
    assert noted.rounding == DITHER_RULE and not json.loads((out / "merge.json").read_text())["merged_training"]
    checked = check_weights(base, deltas, exported, noted)
    assert not checked.outside and checked.worst["dithered"].worst == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["format=bf16"],
            "rounding=dithered is for formats that round experts (mxfp4, original, gguf, gguf_q8_0), not",
        ),
        (["format=adapter_gguf"], "rounding=dithered is for formats that round experts"),
        (["format=mxfp4", "layers=[0]"], "layers must be null unless rounding=calibrated"),
        (["format=gguf", "base=BF16"], "holds bf16 experts, and rounding=dithered starts from the MXFP4 numbers"),
    ],
)
def test_what_cannot_be_dithered_is_refused(run, small_bases, tmp_path, capsys, words, message):
    words = [word.replace("BF16", str(small_bases["bf16"])) for word in words]
    assert main(["export", f"run={run}", *words, "rounding=dithered", f"out={tmp_path / 'out'}"]) != 0
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_dithered_exports_are_compared_exactly_and_by_their_rule_alone(run, small_bases, tmp_path):
    out = tmp_path / "out"
    export_run(run, "mxfp4", out, dithered=True)
    base, unpacked = (Checkpoint.open(small_bases[layout]) for layout in ("mxfp4", "bf16"))
    check_dithered(noted_in(out), base, out)
    # One number is a step off, which the bound of rounding to nearest has room for.
    (file,) = out.glob("*.safetensors")
    tensors = load_file(file)
    name = "model.layers.1.mlp.experts.down_proj"
    tensors[f"{name}_blocks"][2].view(-1)[7] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})
    (out / "manifest.json").unlink()
    checked = check_weights(base, read_adapter(run / "adapter", base.spec), Checkpoint.open(out), noted_in(out))
    assert [weight.place for weight in checked.outside] == [f"{name}, expert 2"]
    checked = check_weights(base, read_adapter(run / "adapter", base.spec), Checkpoint.open(out), Noted())
    assert not [weight.place for weight in checked.outside]

    with pytest.raises(UserError, match=f"{unpacked.path} holds bf16 experts, and {out} was dithered from packed ones"):
        check_dithered(noted_in(out), unpacked, out)
    record = json.loads((out / "merge.json").read_text())
    (out / "merge.json").write_text(json.dumps(record | {"rounding": "dithered 0"}))
    with pytest.raises(UserError, match=f"rule 'dithered 0'.* knows '{DITHER_RULE}' alone"):
        check_dithered(noted_in(out), base, out)
    # Exports from before rules were recorded: rounded to nearest, if not in training.
    (out / "merge.json").write_text(json.dumps({key: value for key, value in record.items() if key != "rounding"}))
    assert noted_in(out).rounding is None


def test_calibrated_rounding_keeps_more_of_a_trained_run(tiny_base, four_rows, tmp_path, capsys):
    run = tmp_path / "run"
    words = [f"run.dir={run}", f"model.path={tiny_base}", f"data.path={four_rows}", "data.eval_fraction=0"]
    words += ["adapter.targets=experts", "adapter.r=4", "trainer.max_steps=6", "trainer.learning_rate=1e-2"]
    words += ["export.formats=[adapter,mxfp4]", "export.rounding=calibrated", "export.calibration_tokens=1000"]
    assert main(["train", "config=quickstart", *words]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"calibrating on \d+ tokens of [1-9] samples", printed)
    assert "of what the base's are" in printed and "FAILED" not in printed
    assert main(["export", f"run={run}", "format=mxfp4", f"out={tmp_path / 'nearest'}"]) == 0
    calibrated, nearest = (verify_run(run, out, data=four_rows) for out in (run / "export/mxfp4", tmp_path / "nearest"))
    print(calibrated, nearest)
    lost = [quantile(report.readings[0].from_trained.relative, 0.5) for report in (calibrated, nearest)]
    assert calibrated.passed and lost[0] < 0.8 * lost[1]

    # The file differs, the numbers do not: GGUF holds the same blocks, those before and after an interruption.
    out = tmp_path / "gguf" / "out"
    words = [f"run={run}", "format=gguf", "rounding=calibrated", "calibration_tokens=1000", f"out={out}"]
    killed = subprocess.run([sys.executable, "-c", INTERRUPTED_EXPORT, "3", *words], check=False)
    assert killed.returncode == -signal.SIGKILL and not out.exists()
    assert main(["export", *words]) == 0
    printed = capsys.readouterr().out
    assert "going on with 3 expert weights" in printed and "minutes more" in printed
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    records = [json.loads(path.read_text()) for path in (run / "merge-mxfp4.json", *run.glob("merge-gguf-*.json"))]
    assert records[0]["tensors"] == records[1]["tensors"]


# Kills its own process when as many expert weights as the first argument says have been noted.
INTERRUPTED_EXPORT = """
import os, signal, sys
from gptoss_ft.cli import main
from gptoss_ft.export.journal import Journal

write = Journal.write

def write_or_die(journal, *args):
    if journal.num_weights == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    write(journal, *args)

Journal.write = write_or_die
main(["export", *sys.argv[2:]])
"""


def test_what_was_rounded_is_used_again_for_the_same_only(run, small_bases, tmp_path):
    folder, base = RunFolder(run).adapter, Checkpoint.open(small_bases["mxfp4"])
    deltas = read_adapter(folder, base.spec)
    all_of_them = Calibrated(100)
    keys = [
        rounding_key(base, deltas, samples, all_of_them) for samples in ([[1, 2], [3]], [[1, 2], [3]], [[1], [2, 3]])
    ]
    other_base = init_checkpoint("tiny", tmp_path / "other", seed=1, progress=False)
    keys.append(rounding_key(Checkpoint.open(other_base), deltas, [[1, 2], [3]], all_of_them))
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": ', '"lora_alpha": 1'))
    keys.append(rounding_key(base, read_adapter(folder, base.spec), [[1, 2], [3]], all_of_them))
    keys.append(rounding_key(base, deltas, [[1, 2], [3]], Calibrated(100, layers=frozenset({0}))))
    keys.append(rounding_key(base, deltas, [[1, 2], [3]], all_of_them, q8_0_weights(base.spec, "gguf_q8_0")))
    assert keys[0] == keys[1] and len(set(keys)) == 6
    assert rounding_key(base, deltas, [[1, 2], [3]], all_of_them, q8_0_weights(base.spec, "gguf")) == keys[0]


def test_what_counts_of_the_rows_is_part_of_what_was_rounded(run, small_bases, tmp_path, monkeypatch):
    base = Checkpoint.open(small_bases["mxfp4"])
    deltas, folders = read_adapter(RunFolder(run).adapter, base.spec), []
    for mask in ([0.0, 0.0, 1.0, 1.0], [0.0, 1.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]):
        rows = [Sample([1, 2, 3, 4], mask, "row", 0)]
        monkeypatch.setattr("gptoss_ft.recipes.export.calibration_samples", lambda *_, rows=rows: (rows, True))
        calibrate = calibration(RunFolder(run), base, deltas, Calibrated(100), tmp_path / "out", "mxfp4")
        assert calibrate.streams.weights_T.tolist() == pytest.approx(token_weights(rows)[0])
        assert calibrate.limits.all_rows
        folders.append(calibrate.journal.folder)
    assert folders[0] == folders[2] != folders[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["format=bf16"],
            "rounding=calibrated is for formats that round experts (mxfp4, original, gguf, gguf_q8_0), not",
        ),
        (["format=adapter"], "rounding=calibrated is for formats that round experts"),
        (["format=mxfp4", "calibration_tokens=0"], "calibration_tokens must be 1 or more"),
        (["format=mxfp4", "layers=[0,9]"], "layers=[9]: "),
        (["format=mxfp4", "experts=[-1]"], "experts must be numbers from 0"),
        (["format=mxfp4", "base=BF16"], "holds bf16 experts, and rounding=calibrated starts from the MXFP4 numbers"),
        (["format=mxfp4"], "rows.jsonl: "),
    ],
)
def test_what_cannot_be_calibrated_is_refused(run, small_bases, tmp_path, capsys, words, message):
    words = [word.replace("BF16", str(small_bases["bf16"])) for word in words]
    assert main(["export", f"run={run}", *words, "rounding=calibrated", f"out={tmp_path / 'out'}"]) != 0
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_second_calibrated_export_gives_way_before_it_begins(run, tmp_path, capsys):
    out = tmp_path / "out"
    first = partial_of(out).with_name(partial_of(out).name.replace(str(os.getpid()), str(os.getppid())))
    first.mkdir()
    assert main(["export", f"run={run}", "format=mxfp4", "rounding=calibrated", f"out={out}"]) == 1
    assert f"out is being written by process {os.getppid()} " in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".out")] == [first.name]


def test_calibration_samples_are_whole_and_within_the_budget(four_rows, tmp_path):
    words = [f"run.dir={tmp_path}", "model.path=base", f"data.path={four_rows}", "data.eval_fraction=0.25"]
    cfg = compose_train_config(words)
    train, held_out, _ = split_samples(cfg.data, cfg.seed)
    sizes = sorted(len(sample.input_ids) for sample in train)
    samples, are_all = calibration_samples(cfg, sum(sizes))
    everything = [sample.input_ids for sample in samples]
    assert are_all
    assert sorted(map(len, everything)) == sizes
    assert not any(sample.input_ids in everything for sample in held_out)
    fewer, are_all = calibration_samples(cfg, sum(sizes) - 1)
    assert not are_all and len(fewer) == len(sizes) - 1 and all(sample.input_ids in everything for sample in fewer)
    for sample, weights in zip(fewer, token_weights(fewer), strict=True):
        emitted = [place for place, weight in enumerate(weights) if weight == 1]
        assert [sample.labels[place + 1] for place in emitted] == [label for label in sample.labels if label != -100]
        assert len(weights) == len(sample.input_ids) and 0 < min(weights) < 0.2
    with pytest.raises(UserError, match=f"the shortest training sample has {sizes[0]} tokens"):
        calibration_samples(cfg, sizes[0] - 1)
