"""Calibrated merging: the inputs that are recorded, the order they come in, and what a merge does with them."""

import pytest
import torch

from gptoss_ft.adapters.attach import Targets, attach_adapters
from gptoss_ft.adapters.save import load_adapter, save_adapter
from gptoss_ft.export.adapter import read_adapter
from gptoss_ft.export.calibrate import Calibration, LayerwiseInputs, Progress
from gptoss_ft.export.journal import Journal, digest, remove_journals
from gptoss_ft.export.merge import merge
from gptoss_ft.export.merged import PackedUpdate, row_workers
from gptoss_ft.kernels.reference import clamped_swiglu, dequantize_mxfp4
from gptoss_ft.model.checkpoint import Checkpoint
from gptoss_ft.model.experts import PROJECTIONS
from gptoss_ft.model.load import load_base
from gptoss_ft.mxfp4.calibrated import MIN_INPUTS

UNTRAINED = 2  # the expert that gets no update


@pytest.fixture(scope="module")
def samples(small_spec):
    generator = torch.Generator().manual_seed(0)
    # Few tokens, often: inputs of experts are correlated in real text too.
    draws = torch.rand(24, 64, generator=generator).square()
    return [*(draws * 20).long().tolist(), [3]]


@pytest.fixture(scope="module")
def adapter(small_spec, small_bases, tmp_path_factory):
    """Updates of experts, of 8 % of the weights: 80 % of what that does is lost by rounding to nearest."""
    targets = Targets.parse(
        ["experts"], num_layers=small_spec.num_hidden_layers, num_experts=small_spec.num_local_experts
    )
    model, _ = attach_adapters(load_base(small_bases["mxfp4"]), targets, r=2, alpha=4)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
            parameter.data[:, UNTRAINED :: small_spec.num_local_experts] = 0
    return save_adapter(model, tmp_path_factory.mktemp("adapter") / "adapter")


@pytest.fixture
def trained(small_bases, adapter):
    return load_adapter(load_base(small_bases["mxfp4"]), adapter)[0]


def outputs(model, samples):
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([ids])).logits[0].double() for ids in samples])


def test_the_inputs_are_those_of_a_whole_forward_pass(trained, small_bases, adapter, samples):
    layers = trained.get_base_model().model.layers
    layerwise = LayerwiseInputs(trained, samples)
    assert list(trained.get_base_model().model.layers) == layerwise.layers
    recorded = [layerwise.advance() for _ in layers]

    seen = [[] for _ in layers]
    for layer, calls in zip(layers, seen, strict=True):
        layer.mlp.experts.register_forward_pre_hook(lambda _, args, calls=calls: calls.append(args))
    outputs(trained, samples)
    base = Checkpoint.open(small_bases["mxfp4"])
    deltas, constants = read_adapter(adapter, base.spec), {"alpha": 1.702, "limit": 7.0}
    for number, (inputs, calls) in enumerate(zip(recorded, seen, strict=True)):
        hidden_TH, experts_TK = torch.cat([call[0] for call in calls]), torch.cat([call[1] for call in calls])
        name = f"model.layers.{number}.mlp.experts.gate_up_proj"
        dense_EOK = dequantize_mxfp4(base.tensor(f"{name}_blocks"), base.tensor(f"{name}_scales"), torch.float64)
        dense_EOK += deltas[name].scaling * (deltas[name].B.double() @ deltas[name].A.double())
        bias_EO = base.tensor(f"{name}_bias").double()
        for expert in range(base.spec.num_local_experts):
            wanted_NH = hidden_TH[(experts_TK == expert).nonzero()[:, 0]]
            assert torch.equal(inputs.of("gate_up_proj", expert), wanted_NH)
            gate_up_N2I = wanted_NH.double() @ dense_EOK[expert].T + bias_EO[expert]
            act_NI = clamped_swiglu(gate_up_N2I, **constants)
            found_NI = inputs.of("down_proj", expert)
            # bf16 products and their rounding.
            assert (found_NI.double() - act_NI).norm() < 0.01 * act_NI.norm()
            assert len(found_NI) > 0


@pytest.fixture
def ask(small_bases, adapter):
    """Ask a calibration for one expert."""
    base = Checkpoint.open(small_bases["mxfp4"])
    deltas = read_adapter(adapter, base.spec)

    def ask(calibration, name, expert):
        stack = name if name in deltas else "model.layers.0.mlp.experts.down_proj"
        delta, (blocks, scales) = (
            deltas[stack],
            (base.tensor(f"{stack}_{part}")[expert] for part in ("blocks", "scales")),
        )
        update = PackedUpdate(blocks, scales, lambda rows: delta.scaling * delta.B[expert][rows] @ delta.A[expert])
        with row_workers() as pool:
            return calibration(name, expert, update, pool)

    return ask


def test_layers_are_asked_for_in_rising_order(trained, samples, ask):
    calibration = Calibration(trained, samples)
    assert ask(calibration, "model.layers.1.mlp.experts.down_proj", 0) is not None
    assert ask(calibration, "model.layers.1.mlp.experts.gate_up_proj", 0) is not None
    with pytest.raises(RuntimeError, match="asked for after layer 1"):
        ask(calibration, "model.layers.0.mlp.experts.gate_up_proj", 0)
    with pytest.raises(ValueError, match="no stack of experts"):
        ask(calibration, "model.layers.1.self_attn.q_proj.weight", 0)


def test_only_the_chosen_experts_are_calibrated(trained, samples, ask):
    calibration = Calibration(trained, samples, layers={1}, experts={0, 3})
    asked = [(layer, expert) for layer in range(2) for expert in range(4)]
    done = [ask(calibration, f"model.layers.{layer}.mlp.experts.down_proj", expert) for layer, expert in asked]
    assert [place for place, found in zip(asked, done, strict=True) if found] == [(1, 0), (1, 3)]


def test_a_journal_gives_back_what_was_noted_and_nothing_else(trained, samples, ask, tmp_path):
    name = "model.layers.1.mlp.experts.gate_up_proj"
    journal = Journal(tmp_path / "out", "a" * 64)
    blocks, scales, stats = ask(Calibration(trained, samples, journal=journal), name, 1)
    assert journal.num_weights == 1

    again = Calibration(trained, samples, journal=Journal(tmp_path / "out", "a" * 64))
    again.layerwise = None  # nothing is run
    found = ask(again, name, 1)
    assert torch.equal(found[0], blocks) and torch.equal(found[1], scales) and found[2] == stats

    # Another base of the same key: it was written by a program that gives zeros another sign, say.
    base = trained.get_base_model().model.layers[1].mlp.experts.get_base_layer()
    base_blocks, base_scales = base.gate_up_proj_blocks[1], base.gate_up_proj_scales[1]
    assert torch.equal(journal.read(name, 1, base_blocks, base_scales)[0], blocks)
    assert journal.read(name, 1, base_blocks ^ 8, base_scales) is None

    (file,) = journal.folder.iterdir()
    for broken in (b"", file.read_bytes()[:-5]):
        file.write_bytes(broken)
        assert journal.read(name, 1, base_blocks, base_scales) is None
    other = Journal(tmp_path / "out", "b" * 64)
    assert other.num_weights == 0 and other.read(name, 1, base_blocks, base_scales) is None
    remove_journals(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_journals_of_other_folders_stay(tmp_path):
    for name in ("m[1]", "m1", "m[1].rounded-x"):
        Journal(tmp_path / name, "a" * 64)
    remove_journals(tmp_path / "m[1]")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f".m1.rounded-{'a' * 16}",
        f".m[1].rounded-x.rounded-{'a' * 16}",
    ]


def test_the_digest_is_of_every_part():
    assert digest(["x", [1, 2]]) == digest(["x", [1, 2]])
    assert len({digest(parts) for parts in (["x", [1, 2]], ["x", [1, 3]], [[1, 2], "x"])}) == 3


def test_the_estimate_is_that_of_the_first_expert(capsys):
    update = PackedUpdate(torch.empty(10, 3, 16), torch.empty(10, 3), lambda rows: rows)
    progress = Progress(21 * 960, num_layers=5)
    progress.seconds_per_layer = 60.0
    progress.rounded(update, 30.0)
    progress.rounded(update, 999.0)
    # 20 more of them, and four more layers to run.
    assert capsys.readouterr().out.splitlines() == [
        "calibrated rounding will take about 14.0 minutes more, by its first expert"
    ]


def test_experts_that_hardly_see_anything_are_rounded_to_nearest(trained, small_bases, adapter, tmp_path):
    base = Checkpoint.open(small_bases["mxfp4"])
    few = [[1, 2, 3] * ((MIN_INPUTS - 1) // 3)]
    deltas = read_adapter(adapter, base.spec)
    report = merge(base, deltas, tmp_path / "few", format="mxfp4", calibrate=Calibration(trained, few), progress=False)
    merge(base, deltas, tmp_path / "nearest", format="mxfp4", progress=False)
    assert (report.num_calibrated, report.num_nearest) == (0, 2 * 2 * 3)
    assert "held-out" not in str(report)
    first, second = (Checkpoint.open(tmp_path / folder) for folder in ("few", "nearest"))
    assert all(torch.equal(first.tensor(name), second.tensor(name)) for name in base.names())


@pytest.mark.parametrize("layout", ["mxfp4", "original"])
def test_calibrated_outputs_are_nearer_to_the_trained_model(trained, small_bases, adapter, samples, layout, tmp_path):
    base = Checkpoint.open(small_bases[layout])
    deltas = read_adapter(adapter, base.spec)
    wanted = outputs(trained, samples)
    reports, distances = {}, {}
    for rounding in ("nearest", "calibrated"):
        calibrate = Calibration(trained, samples) if rounding == "calibrated" else None
        out = tmp_path / rounding
        reports[rounding] = merge(base, deltas, out, format="mxfp4", calibrate=calibrate, progress=False)
        distances[rounding] = (outputs(load_base(out), samples) - wanted).norm()
        merged = Checkpoint.open(out)
        for layer in range(base.spec.num_hidden_layers):
            for part in (f"{name}_{part}" for name in PROJECTIONS for part in ("blocks", "scales")):
                name = f"model.layers.{layer}.mlp.experts.{part}"
                assert torch.equal(merged.tensor(name)[UNTRAINED], base.tensor(name)[UNTRAINED])
    assert distances["calibrated"] < 0.75 * distances["nearest"]
    report = reports["calibrated"]
    assert (report.num_calibrated, report.num_nearest) == (2 * 2 * 3, 0)
    assert "12 of 12 trained experts rounded for their inputs: error" in str(report)
    assert report.to_dict()["overall"]["output_error"] < 0.6
    assert reports["nearest"].to_dict()["overall"]["output_error"] is None
    assert all(stats.output_error for stats in report.updates.values())
