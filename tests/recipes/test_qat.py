"""Merge-aware training: what the last forward pass computed with is, byte for byte, what is exported."""

import json
import os
import shutil
import subprocess
import sys

import gguf
import pytest
import torch

from gptoss_ft.adapters.merged import compute_merged
from gptoss_ft.adapters.save import load_adapter
from gptoss_ft.cli import main
from gptoss_ft.config.load import load_train_config
from gptoss_ft.errors import ConfigError, UserError
from gptoss_ft.kernels import dispatch, experts
from gptoss_ft.kernels.merging import DITHER_RULE
from gptoss_ft.kernels.reference import dequantize_mxfp4
from gptoss_ft.model.checkpoint import Checkpoint
from gptoss_ft.model.load import load_base
from gptoss_ft.recipes import qat, sft
from gptoss_ft.recipes.export import Calibrated, export_run
from gptoss_ft.training.run_folder import RunFolder

PROJECTIONS = ("gate_up_proj", "down_proj")


def words(run, base, rows, *more):
    return [
        "config=qat_tiny",
        f"run.dir={run}",
        f"model.path={base}",
        f"data.path={rows}",
        f"data.eval_path={rows}",
        "data.eval_fraction=0",
        "adapter.targets=[attention,router,experts]",
        "trainer.max_steps=3",
        "trainer.warmup_steps=0",
        "trainer.learning_rate=1e-2",
        *more,
    ]


@pytest.fixture(scope="module")
def trained(tiny_base, four_rows, tmp_path_factory):
    """A run folder, and of every expert product of the last forward pass where rows end and what was multiplied."""
    folder = tmp_path_factory.mktemp("runs") / "qat"
    more = ["trainer.gradient_checkpointing=true", "export.formats=[mxfp4,original,bf16]"]
    seen = []
    merge = experts.dispatch.merge_mxfp4_dithered

    def noting(weight, A, B, scaling, ends_E, chosen):
        merged = merge(weight, A, B, scaling, ends_E, chosen)
        seen.append((ends_E, merged))
        return merged

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(experts.dispatch, "merge_mxfp4_dithered", noting)
        cfg = load_train_config(words(folder, tiny_base, four_rows, *more))
        assert qat.main(cfg) == folder
    num_layers = Checkpoint.open(tiny_base).spec.num_hidden_layers
    return folder, seen[-2 * num_layers :]


@pytest.fixture(scope="module")
def trained_model(trained, tiny_base):
    model, _ = load_adapter(load_base(tiny_base, dtype=torch.float32), trained[0] / "adapter")
    return compute_merged(model)


@pytest.mark.parametrize("format", ["mxfp4", "original"])
def test_exported_experts_have_the_bytes_of_the_last_forward_pass(format, trained, tiny_base):
    folder, last_pass = trained
    base, exported = Checkpoint.open(tiny_base), Checkpoint.open(folder / "export" / format)
    compared = changed = 0
    for name, expert, merged in experts_of(last_pass):
        for part, tensor in zip(("blocks", "scales"), merged, strict=True):
            (found,) = exported.read(f"{name}_{part}", expert, expert + 1)
            assert torch.equal(tensor, found), (name, part, expert)
            changed += not torch.equal(base.read(f"{name}_{part}", expert, expert + 1)[0], found)
            compared += 1
    assert compared > len(last_pass) * 4
    assert changed > compared / 4


def test_experts_in_gguf_have_the_numbers_of_the_last_forward_pass(trained):
    folder, last_pass = trained
    out = export_run(folder, "gguf", folder / "export" / "gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(out / "model.gguf").tensors}
    for name, expert, merged in experts_of(last_pass):
        block = f"blk.{name.split('.')[2]}"
        wanted = dequantize_mxfp4(*merged, torch.float32)
        parts = {"gate": wanted[0::2], "up": wanted[1::2]} if "gate_up" in name else {"down": wanted}
        for part, numbers in parts.items():
            tensor = tensors[f"{block}.ffn_{part}_exps.weight"]
            found = gguf.dequantize(tensor.data[expert].copy(), tensor.tensor_type)
            assert torch.equal(torch.from_numpy(found), numbers), (name, expert, part)


def experts_of(last_pass):
    """Names, experts that had rows, and their merged blocks and scales."""
    for i, (ends_E, merged) in enumerate(last_pass):
        name = f"model.layers.{i // 2}.mlp.experts.{PROJECTIONS[i % 2]}"
        for expert in dispatch.merging.experts_with_rows(len(ends_E), ends_E):
            yield name, expert, [part[expert] for part in merged]


@pytest.mark.parametrize("format", ["mxfp4", "bf16"])
def test_every_export_is_the_trained_model_bit_for_bit(format, trained, trained_model, tiny_base):
    exported = load_base(
        trained[0] / "export" / format, precision="bf16" if format == "bf16" else "mxfp4", dtype=torch.float32
    )
    ids = torch.randint(0, 200_000, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = trained_model(input_ids=ids).logits, exported(input_ids=ids).logits
        base = load_base(tiny_base, dtype=torch.float32)(input_ids=ids).logits
    if format == "bf16":  # dense products add up in another order
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(theirs, ours)
    assert (base - ours).abs().max() > 1e-2


def test_reports_say_what_was_done(trained):
    folder, _ = trained
    merged = json.loads((folder / "merge-mxfp4.json").read_text())
    assert merged["merged_training"] and merged["overall"]["changed_share"] > 0
    verified = json.loads((folder / "verify-mxfp4.json").read_text())
    assert verified["passed"] and verified["weights"]["worst"]["merged"]["relative"] == 0
    assert merged["rounding"] == DITHER_RULE
    assert json.loads((folder / "rounding.json").read_text()) == {"trained_through": DITHER_RULE}
    assert "merge" in (folder / "adapter" / "README.md").read_text().lower()


def test_held_out_loss_is_of_the_merged_model(trained, trained_model):
    folder, _ = trained
    assert reported_loss(folder) == pytest.approx(held_out_loss(trained_model, folder), rel=1e-4)


def reported_loss(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["eval_loss_nats"] for line in lines if "eval_loss_nats" in line][-1]


@torch.no_grad()
def held_out_loss(model, run):
    cfg = load_train_config([f"config={run / 'config.yaml'}"])
    _, eval_set = sft.build_datasets(cfg.data, cfg.seed)
    total = count = 0
    for sample in eval_set:
        logits = model(input_ids=torch.tensor(sample["input_ids"], dtype=torch.int64)[None]).logits[0, :-1]
        labels = torch.tensor(sample["labels"], dtype=torch.int64)[1:]
        total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        count += int((labels >= 0).sum())
    return total / count


@pytest.fixture
def one_thread():
    """Torch's own sums over several threads are not always in the same order."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def test_a_resumed_run_exports_the_bytes_of_one_that_was_never_interrupted(
    tiny_base, four_rows, tmp_path, stopping_after, one_thread
):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    more = ["trainer.save_steps=2", "trainer.max_steps=4", "export.formats=[mxfp4]"]
    assert main(["train", *words(whole, tiny_base, four_rows, *more)]) == 0

    with stopping_after(3):
        assert main(["train", *words(broken, tiny_base, four_rows, *more)]) == 130
    assert not (broken / "export").exists()
    assert main(["train", *words(broken, tiny_base, four_rows, *more, "run.resume=true")]) == 0
    ours, theirs = (
        {file.name: file.read_bytes() for file in (run / "export" / "mxfp4").glob("*.safetensors")}
        for run in (broken, whole)
    )
    assert ours and ours == theirs


@pytest.mark.slow
def test_two_processes_train_the_model_that_is_exported(tiny_base, four_rows, tmp_path):
    def run(name, launcher, batch_size):
        folder = tmp_path / name
        arguments = words(folder, tiny_base, four_rows, "export.formats=[mxfp4]")
        arguments += [f"trainer.per_device_train_batch_size={batch_size}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([*launcher, "-m", "gptoss_ft", "train", *arguments], check=True, env=environment)
        return folder

    two = run("two", [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"], 1)
    one = run("one", [sys.executable], 2)
    # Sums in another order move numbers across thresholds.
    assert reported_loss(two) == pytest.approx(reported_loss(one), rel=1e-2)
    # Each process measured its own rows.
    exported = load_base(two / "export" / "mxfp4", dtype=torch.float32)
    assert reported_loss(two) == pytest.approx(held_out_loss(exported, two), rel=1e-5)
    verified = json.loads((two / "verify-mxfp4.json").read_text())
    assert verified["passed"] and verified["weights"]["worst"]["merged"]["relative"] == 0


@pytest.mark.parametrize("format", ["adapter", "adapter_gguf", "adapter_vllm", "adapter_sglang"])
def test_the_adapter_alone_is_refused(format, trained, tmp_path, capsys):
    assert main(["export", f"run={trained[0]}", f"format={format}", f"out={tmp_path / 'out'}"]) == 1
    assert "adapter.qat=true" in (error := capsys.readouterr().err) and "format=mxfp4" in error
    assert not (tmp_path / "out").exists()


def test_the_rule_that_a_run_was_trained_through_is_compared(trained, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained[0], run, ignore=shutil.ignore_patterns("export"))
    words = [f"run={run}", "format=mxfp4", "fidelity_tokens=0"]
    assert main(["export", *words, f"out={tmp_path / 'same'}", "rounding=dithered"]) == 0
    assert "rounding.json" not in capsys.readouterr().out
    same = (tmp_path / "same" / "model.safetensors").read_bytes()
    assert same == (trained[0] / "export" / "mxfp4" / "model.safetensors").read_bytes()

    (run / "rounding.json").write_text('{"trained_through": "dithered 0"}')
    assert main(["export", *words, f"out={tmp_path / 'other'}"]) == 1
    assert main(["verify", f"run={run}", f"path={tmp_path / 'same'}"]) == 1
    shutil.rmtree(run / "adapter")
    (run / "checkpoints" / "checkpoint-2").mkdir(parents=True)
    with pytest.raises(UserError, match="was trained through the rounding 'dithered 0'"):
        sft.open_run_folder(RunFolder(run), load_train_config([f"config={run / 'config.yaml'}", "run.resume=true"]))
    error = f"'dithered 0', and this version of gptoss-ft rounds by '{DITHER_RULE}'"
    assert capsys.readouterr().err.count(error) == 2
    assert not (tmp_path / "other").exists()


def test_a_run_that_does_not_tell_its_rule_is_named(trained, tmp_path, capsys):
    run = shutil.copytree(trained[0], tmp_path / "run", ignore=shutil.ignore_patterns("export", "rounding.json"))
    assert main(["export", f"run={run}", "format=mxfp4", "fidelity_tokens=0", f"out={tmp_path / 'out'}"]) == 0
    assert f"{run} has no rounding.json: it began before runs recorded" in capsys.readouterr().out
    (run / "rounding.json").write_text("[]")
    with pytest.raises(UserError, match=r"rounding\.json is damaged"):
        RunFolder(run).trained_rounding()


def test_another_rounding_is_refused(trained, tmp_path):
    with pytest.raises(UserError, match="Leave rounding out"):
        export_run(trained[0], "mxfp4", tmp_path / "out", calibrated=Calibrated(64))


def test_a_base_with_expanded_experts_is_refused(trained, tmp_path, capsys):
    bf16 = trained[0] / "export" / "bf16"
    assert main(["export", f"run={trained[0]}", "format=mxfp4", f"base={bf16}", f"out={tmp_path / 'out'}"]) == 1
    assert main(["verify", f"run={trained[0]}", f"base={bf16}", f"path={trained[0] / 'export' / 'mxfp4'}"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert sum(f"error: {bf16} holds bf16 experts, and " in line for line in errors) == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("adapter.dropout=0.1", "adapter.dropout must be 0 with adapter.qat=true"),
        ("model.precision=bf16", "adapter.qat=true needs model.precision=mxfp4"),
        ("export.formats=[mxfp4,adapter_vllm]", "must not name adapter_vllm with adapter.qat=true"),
        ("export.rounding=calibrated", "export.rounding=calibrated is another rounding"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(word, message):
    with pytest.raises(ConfigError, match=message):
        load_train_config(["config=qat_tiny", word])
