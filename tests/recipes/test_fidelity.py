"""What a merge keeps of the training: measured when it is written, judged, recorded, and left where it belongs."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptoss_ft.adapters.save import load_adapter
from gptoss_ft.cli import main
from gptoss_ft.errors import UserError
from gptoss_ft.export.adapter import read_adapter
from gptoss_ft.export.distance import Distances, fidelity
from gptoss_ft.export.excerpts import select_positions
from gptoss_ft.export.fidelity import measure_fidelity
from gptoss_ft.export.verify import read_export, trained_logits
from gptoss_ft.kernels.reference import dequantize_mxfp4
from gptoss_ft.model.checkpoint import Checkpoint
from gptoss_ft.model.load import load_base
from gptoss_ft.model.manifest import check_hashes
from gptoss_ft.recipes.export import config_of
from gptoss_ft.recipes.samples import rows_to_compare
from gptoss_ft.recipes.verify import verify_run
from gptoss_ft.training.run_folder import RunFolder

TOKENS = 400
GATE_UP, Q_PROJ = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.self_attn.q_proj.weight"


def train(folder, base, rows, *words):
    command = ["train", "config=quickstart", f"run.dir={folder}", f"model.path={base}", f"data.path={rows}"]
    command += ["data.eval_fraction=0", "adapter.r=4", "export.formats=[]", "trainer.learning_rate=1e-2"]
    assert main([*command, *words]) == 0
    return RunFolder(folder)


@pytest.fixture(scope="module")
def run(tiny_base, four_rows, tmp_path_factory):
    return train(tmp_path_factory.mktemp("runs") / "run", tiny_base, four_rows, "trainer.max_steps=5")


@pytest.fixture
def barely(run, tmp_path):
    """The run with experts that moved so little that rounding to nearest writes the base again."""
    return scaled(run, 0.06, tmp_path / "barely")


def scaled(run, share, folder):
    """A run with that share of the experts' updates, and no others."""
    folder = shutil.copytree(run.path, folder)
    file = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensor *= share if "experts" in name else 0
    save_file(tensors, file)
    return RunFolder(folder)


def export(run, out, *words):
    return main(["export", f"run={run.path}", f"out={out}", f"fidelity_tokens={TOKENS}", *words])


def record(folder):
    return json.loads((folder / "merge.json").read_text())


@pytest.fixture(scope="module")
def merged(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("merged") / "mxfp4"
    assert export(run, folder, "format=mxfp4") == 0
    return folder


def excerpts_of(run):
    cfg = config_of(run)
    return select_positions(rows_to_compare(cfg.data, cfg.seed, None), 256, max_tokens=TOKENS)


def test_the_report_says_what_transformers_says(run, tiny_base, merged):
    excerpts, base = excerpts_of(run), Checkpoint.open(tiny_base)
    wanted = record(merged)["fidelity"]
    assert wanted["num_tokens"] == sum(len(excerpt.input_ids_T) for excerpt in excerpts) <= TOKENS
    trained, of_base = trained_logits(base, run.adapter, excerpts)
    (first, *_), _ = read_export(tiny_base, merged, "mxfp4", excerpts, trained)
    assert first.program.startswith("transformers")
    for distances, summary in ((first.from_trained, "export"), (of_base, "base")):
        for name, number in distances.summary().items():
            assert wanted["distance_from_trained"][summary][name] == pytest.approx(number, rel=1e-3, abs=1e-7), name
    assert wanted["fidelity"] == pytest.approx(fidelity(of_base, first.from_trained), rel=1e-4)
    assert 0.5 < wanted["fidelity"] < 1


# The gguf package takes its time to read a vocabulary.
@pytest.mark.parametrize(
    "format", ["original", "bf16", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gguf", "gguf_q8_0"))]
)
def test_every_layout_of_one_model_has_one_report(run, merged, tmp_path, format, capsys):
    assert export(run, tmp_path / "out", f"format={format}") == 0
    wanted, found = (record(folder)["fidelity"] for folder in (merged, tmp_path / "out"))
    assert f"fidelity {found['fidelity']:.3f}" in capsys.readouterr().out
    assert json.loads(next(run.path.glob(f"merge-{format}-out-*.json")).read_text())["fidelity"] == found
    if format in ("original", "gguf"):
        assert found == wanted
    elif format == "gguf_q8_0":  # 8 bits cost little beside 4 bits
        assert wanted["fidelity"] - 0.05 < found["fidelity"] < wanted["fidelity"] + 0.01
    else:
        assert found["fidelity"] > 0.97 > wanted["fidelity"]


def test_layers_and_outputs_are_those_of_whole_models(run, tiny_base, merged):
    """Against transformers' own hidden states, and against x, W, W' and D multiplied out in fp64."""
    found, excerpts = record(merged), excerpts_of(run)
    base, export = Checkpoint.open(tiny_base), Checkpoint.open(merged)

    def hidden(model, excerpt):
        with torch.no_grad():
            return model(input_ids=excerpt.input_ids_T[None], output_hidden_states=True, logits_to_keep=1).hidden_states

    trained, _ = load_adapter(load_base(base.path, dtype=torch.float32), run.adapter)
    exported = load_base(export.path, dtype=torch.float32)
    pairs = [(hidden(exported, excerpt)[1:-1], hidden(trained, excerpt)[1:-1]) for excerpt in excerpts]
    for number, layer in enumerate(found["fidelity"]["layer_output_distance"][:-1]):
        ours, theirs = (torch.cat([pair[side][number][0] for pair in pairs]) for side in (0, 1))
        assert layer["exported"] == pytest.approx(float((ours - theirs).norm() / theirs.norm()), rel=1e-3)
        assert layer["base"] > layer["exported"] > 0

    inputs = []
    mlp = trained.get_base_model().model.layers[0].mlp
    hook = mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0]))
    for excerpt in excerpts:
        hidden(trained, excerpt)
    hook.remove()
    with torch.no_grad():
        _, _, chosen_TK = mlp.router(torch.cat(inputs))
    deltas, shift = read_adapter(run.adapter, base.spec), 0.25
    delta, error_sq, shifted_sq, update_sq = deltas[GATE_UP], 0.0, 0.0, 0.0
    for expert in range(base.spec.num_local_experts):
        x = torch.cat(inputs)[(chosen_TK == expert).any(-1)].double()[:64]
        D = delta.scaling * delta.B[expert].double() @ delta.A[expert].double()
        before, after = (
            dequantize_mxfp4(*(m.tensor(f"{GATE_UP}_{part}")[expert] for part in ("blocks", "scales")), torch.float64)
            for m in (base, export)
        )
        error_sq += float((x @ (after - before - D).T).square().sum())
        shifted_sq += float((x @ (after - before - D).T + shift).square().sum())
        update_sq += float((x @ D.T).square().sum())
    assert found["tensors"][GATE_UP]["held_out_output_error"] == pytest.approx((error_sq / update_sq) ** 0.5, rel=1e-3)
    assert found["tensors"][Q_PROJ]["held_out_output_error"] < 0.05

    class Shifted:
        """The export with other biases, as calibrated rounding writes them."""

        def __getattr__(self, name):
            return getattr(export, name)

        def read(self, name, *rows):
            return export.read(name, *rows) + (shift if name == f"{GATE_UP}_bias" else 0)

    again = measure_fidelity(base, run.adapter, deltas, Shifted(), excerpts, progress=False)
    assert again.output_errors[GATE_UP].relative == pytest.approx((shifted_sq / update_sq) ** 0.5, rel=1e-3)
    table = next(run.path.glob("merge-mxfp4-mxfp4-*.txt")).read_text()
    assert GATE_UP in table and "layer" in table


def test_what_keeps_too_little_is_not_written_under_its_name(barely, tmp_path, capsys):
    out = tmp_path / "out"
    assert export(barely, out, "format=mxfp4") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"error: {out} was not written, fidelity " in error and "below 0.5" in error
    for cure in ("format=adapter", "rounding=calibrated", "format=bf16", "adapter.targets=attention", "min_fidelity=0"):
        assert cure in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["barely", "out.rejected"]
    assert Checkpoint.open(tmp_path / "out.rejected").layout == "mxfp4"
    assert record(tmp_path / "out.rejected")["fidelity"]["fidelity"] < 0.5

    manifest = json.loads((tmp_path / "out.rejected" / "manifest.json").read_text())
    assert {*manifest["files"], "manifest.json"} == {path.name for path in (tmp_path / "out.rejected").iterdir()}
    check_hashes(tmp_path / "out.rejected")
    kept = tmp_path / "out.rejected" / "kept"
    kept.touch()
    assert export(barely, out, "format=mxfp4") == 1
    assert f"from {out}.rejected-2, where they were left" in capsys.readouterr().err
    assert kept.exists() and Checkpoint.open(f"{out}.rejected-2").layout == "mxfp4"

    assert export(barely, out, "format=mxfp4", "min_fidelity=0") == 0
    assert record(out) == record(tmp_path / "out.rejected")
    assert export(barely, tmp_path / "bf16", "format=bf16") == 0
    assert export(barely, tmp_path / "unmeasured", "format=mxfp4", "fidelity_tokens=0") == 0
    assert "was not measured" in capsys.readouterr().out
    assert record(tmp_path / "unmeasured")["fidelity"] is None


def test_dithering_keeps_more_of_what_is_larger_than_its_noise(run, barely, tmp_path, capsys):
    some = scaled(run, 0.3, tmp_path / "some")
    kept = {}
    for rounding in ("nearest", "dithered"):
        out = tmp_path / rounding
        assert export(some, out, "format=mxfp4", f"rounding={rounding}", "min_fidelity=0") == 0
        kept[rounding] = record(out)["fidelity"]["fidelity"]
    assert kept["dithered"] > kept["nearest"] + 0.1
    # Where it is smaller, the base is nearer to the trained model.
    assert export(barely, tmp_path / "noise", "format=mxfp4", "rounding=dithered") == 1
    assert "fidelity -0." in capsys.readouterr().err
    assert not (tmp_path / "noise").exists()


def test_a_rejected_export_says_where_its_rounding_is_kept(barely, tmp_path, capsys):
    words = ["format=mxfp4", "rounding=calibrated", "calibration_tokens=571", "layers=[0]", "min_fidelity=0.9999"]
    assert export(barely, tmp_path / "out", *words) == 1
    (kept,) = tmp_path.glob(".out.rounded-*")
    assert f"the rounded experts stay in {kept} for that" in capsys.readouterr().err
    assert export(barely, tmp_path / "out", *words[:-1], "min_fidelity=0") == 0
    assert not kept.exists()


def test_a_training_without_effect_is_said_to_have_none(run, tmp_path, capsys):
    folder = RunFolder(shutil.copytree(run.path, tmp_path / "run"))
    file = folder.adapter / "adapter_model.safetensors"
    save_file({name: t * ("lora_A" in name) for name, t in load_file(file).items()}, file)
    assert export(folder, tmp_path / "out", "format=mxfp4") == 0
    printed = capsys.readouterr().out
    assert "the training changes nothing at" in printed and "less than the arithmetic of servers" in printed
    assert record(tmp_path / "out")["fidelity"]["fidelity"] is None


def test_a_run_is_merged_once(run, tmp_path, capsys):
    once = tmp_path / "once"
    words = ["format=bf16", "fidelity_tokens=0", f"base={once}"]
    assert export(run, once, "format=bf16", "fidelity_tokens=0") == 0
    assert export(run, tmp_path / "twice", *words) == 1
    assert f"{once} holds the update of {run.path} already" in capsys.readouterr().err
    assert not (tmp_path / "twice").exists()
    assert export(run, tmp_path / "twice", *words, "merged_base=true") == 0
    merged = record(tmp_path / "twice")["merged"]
    assert len(merged) == 2 and merged[0] == record(once)["merged"][0]
    assert merged[0]["adapter"] == merged[1]["adapter"] and merged[0]["base"] != merged[1]["base"]

    assert verify_run(run.path, tmp_path / "twice", base=once, max_tokens=2).weights.outside == []
    with pytest.raises(UserError, match=r"twice was merged into another base than .* base=FOLDER"):
        verify_run(run.path, tmp_path / "twice", max_tokens=2)

    (once / "merge.json").write_text("{}")
    assert export(run, tmp_path / "third", *words) == 1
    assert f"{once / 'merge.json'} has 2 bytes where manifest.json says " in capsys.readouterr().err
    (once / "manifest.json").unlink()
    assert export(run, tmp_path / "third", *words) == 1
    assert f"{once / 'merge.json'} is damaged" in capsys.readouterr().err


def test_rows_that_have_moved_are_named_before_anything_is_written(run, four_rows, tmp_path, capsys):
    folder = RunFolder(shutil.copytree(run.path, tmp_path / "run"))
    folder.config.write_text(folder.config.read_text().replace(str(four_rows), str(tmp_path / "gone.jsonl")))
    assert export(folder, tmp_path / "out", "format=mxfp4") == 1
    assert f"{tmp_path / 'gone.jsonl'}: no such file" in (error := capsys.readouterr().err)
    assert "data=FILE, or measure nothing: fidelity_tokens=0" in error
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert export(folder, tmp_path / "out", "format=mxfp4", f"data={four_rows}") == 0


@pytest.mark.parametrize("word", ["min_fidelity=1.5", "min_fidelity=nan", "fidelity_tokens=-1"])
def test_bounds_that_nothing_keeps_are_refused(run, tmp_path, word):
    assert export(run, tmp_path / "out", "format=mxfp4", word) == 2


@pytest.mark.parametrize("kept", [0.0, 0.25, 0.5, 1.0])
def test_fidelity_is_the_share_of_the_way(kept):
    """A model that goes a share of a short way has it for its fidelity, by definition of KL's second order."""
    generator = torch.Generator().manual_seed(0)
    trained, step = (torch.randn(64, 50, generator=generator, dtype=torch.float64) for _ in range(2))
    base, export = trained - 1e-3 * step, trained - (1 - kept) * 1e-3 * step
    of_base, of_export = (Distances.between(trained, logits) for logits in (base, export))
    assert fidelity(of_base, of_export) == pytest.approx(kept, abs=1e-3)
    assert fidelity(of_export, of_export) == (None if kept == 1 else 0)


def test_one_position_is_measured_however_few_tokens_are_allowed(run):
    cfg = config_of(run)
    samples = rows_to_compare(cfg.data, cfg.seed, None)
    (only,) = select_positions(samples, 256, max_tokens=2)
    assert len(only.positions_P) == 1
    first = min(next(t for t, label in enumerate(s.labels) if t and label != -100) for s in samples)
    assert len(only.input_ids_T) == first
