"""`gptoss-ft train` as a user runs it, on a small share of the quickstart."""

import json
import os
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file

from gptoss_ft.cli import main
from gptoss_ft.config.load import load_train_config
from gptoss_ft.kernels import cpu_library
from gptoss_ft.kernels.gpu import packed_experts
from gptoss_ft.recipes import sft


def words(run, base, rows, *more):
    return [
        "config=quickstart",
        f"run.dir={run}",
        f"model.path={base}",
        f"data.path={rows}",
        "data.eval_fraction=0.25",
        "adapter.r=4",
        "trainer.per_device_train_batch_size=2",
        "trainer.max_steps=4",
        "trainer.warmup_steps=0",
        "export.formats=[]",
        *more,
    ]


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run):
    logged = [(line["step"], line["loss_nats"]) for line in metrics(run) if "loss_nats" in line]
    assert len(logged) == len(dict(logged)), "a step was logged twice"
    return dict(logged)


@pytest.fixture(autouse=True)
def one_thread():
    """Torch sums in another order with every number of threads, and with several not always in the same one."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def test_a_run_leaves_everything_that_it_takes_to_repeat_it(tiny_base, four_rows, tmp_path):
    run = tmp_path / "run"
    assert main(["train", *words(run, tiny_base, four_rows)]) == 0
    names = {entry.name for entry in run.iterdir()}
    assert {"config.yaml", "versions.json", "metrics.jsonl", "audit.json", "summary.json", "adapter"} <= names

    assert json.loads((run / "versions.json").read_text())["torch"] == torch.__version__
    assert sorted(losses(run)) == [1, 2, 3, 4]
    logged = [line for line in metrics(run) if "loss_nats" in line]
    assert all(line["tokens_per_s"] > 0 and line["peak_gib"] > 0 for line in logged)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["eval_loss_after_nats"] < summary["eval_loss_before_nats"]
    assert json.loads((run / "audit.json").read_text())["num_tensors"] == 4 * 6 * 2

    again = tmp_path / "again"
    assert main(["train", f"config={run / 'config.yaml'}", f"run.dir={again}"]) == 0
    assert losses(again) == losses(run)


def test_a_used_run_folder_is_refused_and_left_alone(tiny_base, four_rows, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    assert main(["train", *words(run, tiny_base, four_rows)]) == 1
    assert "in use (it holds notes.txt)" in capsys.readouterr().err
    assert [entry.name for entry in run.iterdir()] == ["notes.txt"]


def test_bad_rows_stop_the_run_before_anything_is_written(tiny_base, four_rows, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(four_rows.read_text() + '{"messages": [{"role": "wizard", "content": "hm"}]}\n')
    run = tmp_path / "run"
    assert main(["train", *words(run, tmp_path / "new_base", bad, "model.init=tiny")]) == 1
    error = capsys.readouterr().err
    assert f"{bad}:5" in error and "wizard" in error
    assert not run.exists() and not (tmp_path / "new_base").exists()


def test_a_resumed_run_equals_one_that_was_never_interrupted(tiny_base, four_rows, tmp_path, stopping_after):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    more = ["trainer.save_steps=2", "trainer.max_steps=6", "adapter.dropout=0.1"]
    assert main(["train", *words(whole, tiny_base, four_rows, *more)]) == 0

    with stopping_after(5):
        assert main(["train", *words(broken, tiny_base, four_rows, *more)]) == 130
    assert not (broken / "adapter").exists()
    assert main(["train", *words(broken, tiny_base, four_rows, *more, "run.resume=true")]) == 0

    assert losses(broken) == losses(whole)
    expected = load_file(whole / "adapter" / "adapter_model.safetensors")
    got = load_file(broken / "adapter" / "adapter_model.safetensors")
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


def test_a_finished_run_is_not_resumed(tiny_base, four_rows, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", *words(run, tiny_base, four_rows, "trainer.save_steps=2")]) == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(["train", *words(run, tiny_base, four_rows, "trainer.save_steps=2", "run.resume=true")]) == 1
    assert "has ended" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_run_that_stopped_after_its_last_checkpoint_is_finished_without_another_step(tiny_base, four_rows, tmp_path):
    run = tmp_path / "run"
    assert main(["train", *words(run, tiny_base, four_rows, "trainer.save_steps=2")]) == 0
    expected = load_file(run / "adapter" / "adapter_model.safetensors")
    (run / "adapter").rename(tmp_path / "lost")
    assert main(["train", *words(run, tiny_base, four_rows, "trainer.save_steps=2", "run.resume=true")]) == 0
    got = load_file(run / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert sorted(losses(run)) == [1, 2, 3, 4]


@pytest.mark.parametrize("change", ["adapter.alpha=100", "adapter.r=8", "trainer.learning_rate=1e-4"])
def test_a_resumed_run_keeps_its_settings(tiny_base, four_rows, tmp_path, capsys, change):
    run = tmp_path / "run"
    assert main(["train", *words(run, tiny_base, four_rows, "trainer.save_steps=2")]) == 0
    (run / "adapter").rename(tmp_path / "lost")
    recorded = (run / "config.yaml").read_text()
    assert main(["train", *words(run, tiny_base, four_rows, "trainer.save_steps=2", "run.resume=true", change)]) == 2
    error = capsys.readouterr().err
    assert change.split("=")[0] in error and "leave it as it was" in error
    assert (run / "config.yaml").read_text() == recorded


def test_a_checkpoint_that_cannot_be_written_leaves_nothing(tiny_base, four_rows, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"

    def full_disk(*_):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    monkeypatch.setattr(sft.SftTrainer, "_save_optimizer_and_scheduler", full_disk)
    assert main(["train", *words(run, tiny_base, four_rows, "trainer.save_steps=2")]) == 1
    assert "full disk" in capsys.readouterr().err
    assert list((run / "checkpoints").iterdir()) == []


def test_divergence_is_named(tiny_base, four_rows, tmp_path, capsys):
    run = tmp_path / "run"
    more = ["trainer.learning_rate=1", "trainer.max_grad_norm=0", "adapter.alpha=1e30"]
    assert main(["train", *words(run, tiny_base, four_rows, *more)]) == 1
    assert "diverged" in capsys.readouterr().err
    assert not (run / "adapter").exists()


def test_bf16_training_learns(tiny_base, four_rows, tmp_path):
    for precision in ("mxfp4", "bf16"):
        run = tmp_path / precision
        more = [f"model.precision={precision}", "model.dtype=bfloat16", "trainer.gradient_checkpointing=true"]
        assert main(["train", *words(run, tiny_base, four_rows, *more)]) == 0
        summary = json.loads((run / "summary.json").read_text())
        assert summary["eval_loss_after_nats"] < summary["eval_loss_before_nats"]


@pytest.mark.slow
def test_two_processes_take_the_same_steps_as_one(four_rows, tmp_path):
    # An odd number of rows, so that the processes do not have equally many.
    three_rows = tmp_path / "three.jsonl"
    three_rows.write_text("\n".join(four_rows.read_text().splitlines()[:3]))

    def run(name, launcher, batch_size):
        folder = tmp_path / name
        arguments = words(folder, folder / "base", four_rows, "model.init=tiny", "data.eval_fraction=0")
        arguments += [f"data.eval_path={three_rows}", "data.analysis_weight=0.5"]
        arguments += [f"trainer.per_device_train_batch_size={batch_size}", "export.formats=[adapter]"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([*launcher, "-m", "gptoss_ft", "train", *arguments], check=True, env=environment)
        return folder

    two = run("two", [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"], 1)
    one = run("one", [sys.executable], 2)
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    evaluations = [[line for line in metrics(run) if "eval_loss_nats" in line] for run in (two, one)]
    for ours, theirs in zip(*evaluations, strict=True):
        assert ours["eval_tokens"] == theirs["eval_tokens"]
        assert ours["eval_loss_nats"] == pytest.approx(theirs["eval_loss_nats"], rel=1e-3)


def test_resume_without_a_checkpoint_says_so(tiny_base, four_rows, tmp_path, capsys):
    assert main(["train", *words(tmp_path / "run", tiny_base, four_rows, "run.resume=true")]) == 1
    assert "holds no checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit", "paged_adamw_8bit"])
def test_every_optimiser_lowers_the_loss(tiny_base, four_rows, tmp_path, optim):
    run = tmp_path / optim
    # 8-bit states exist only for tensors of 4096 numbers and more.
    assert main(["train", *words(run, tiny_base, four_rows, f"trainer.optim={optim}", "adapter.r=32")]) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert summary["eval_loss_after_nats"] < summary["eval_loss_before_nats"]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_schedules_take_their_course(tiny_base, four_rows, tmp_path, schedule):
    run = tmp_path / schedule
    more = [f"trainer.lr_scheduler_type={schedule}", "trainer.learning_rate=1e-3"]
    assert main(["train", *words(run, tiny_base, four_rows, *more)]) == 0
    rates = [line["learning_rate"] for line in metrics(run) if "learning_rate" in line]
    assert rates[0] == pytest.approx(1e-3)
    assert all(a == b if schedule == "constant" else a > b for a, b in pairwise(rates))


def test_wandb_records_the_run_offline(tiny_base, four_rows, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_DIR", raising=False)
    run = tmp_path / "run"
    assert main(["train", *words(run, tiny_base, four_rows, "trainer.report_to=[wandb]")]) == 0
    records = list((run / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(records) == 1 and b"train/loss" in records[0].read_bytes()


def test_tensorboard_records_the_run(tiny_base, four_rows, tmp_path, monkeypatch):
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    run = tmp_path / "run"
    assert main(["train", *words(run, tiny_base, four_rows, "trainer.report_to=[tensorboard]")]) == 0
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))


def test_checkpoints_load_in_stock_peft(tiny_base, four_rows, tmp_path):
    run = tmp_path / "run"
    assert main(["train", *words(run, tiny_base, four_rows, "trainer.save_steps=4")]) == 0
    checkpoint = run / "checkpoints" / "checkpoint-4"
    config = json.loads((checkpoint / "adapter_config.json").read_text())
    assert sorted(config["target_parameters"]) == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    final = load_file(run / "adapter" / "adapter_model.safetensors")
    saved = load_file(checkpoint / "adapter_model.safetensors")
    assert saved.keys() == final.keys()
    assert all(torch.equal(saved[name], final[name]) for name in final)


def test_several_gpus_in_one_process_are_refused(monkeypatch, tiny_base, four_rows, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES"):
        sft.main(load_train_config(words(tmp_path / "run", tiny_base, four_rows)))


def test_a_number_of_fused_rows_that_is_none_is_one_line(monkeypatch, tiny_base, four_rows, tmp_path, capsys):
    monkeypatch.setenv(packed_experts.FUSED_ROWS_VARIABLE, "many")
    assert main(["train", *words(tmp_path / "run", tiny_base, four_rows)]) == 1
    assert capsys.readouterr().err.startswith("error: GPTOSS_FT_FUSED_ROWS=many: give a number of rows per expert")
    assert not (tmp_path / "run").exists()


def test_an_instruction_set_that_the_processor_lacks_is_one_line(monkeypatch, tiny_base, four_rows, tmp_path, capsys):
    if cpu_library.library() is None:
        pytest.skip("the CPU library was not built")
    monkeypatch.setenv(cpu_library.ISA_VARIABLE, "avx1024")
    assert main(["train", *words(tmp_path / "run", tiny_base, four_rows)]) == 1
    assert capsys.readouterr().err.startswith("error: GPTOSS_FT_CPU_ISA=avx1024: this processor runs portable")
    assert not (tmp_path / "run").exists()
    for command in (["export", "format=mxfp4", f"out={tmp_path / 'out'}"], ["verify", f"path={tmp_path}"]):
        assert main([*command, f"run={tmp_path}"]) == 1
        assert capsys.readouterr().err.startswith("error: GPTOSS_FT_CPU_ISA=avx1024")
