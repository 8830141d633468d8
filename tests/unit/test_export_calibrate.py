"""Calibrated merging: the inputs that are recorded, the order they come in, and what a merge does with them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gptoss_ft.adapters.attach import Targets, attach_adapters
from gptoss_ft.adapters.save import load_adapter, save_adapter
from gptoss_ft.config.values import Rounding
from gptoss_ft.errors import UserError
from gptoss_ft.export.adapter import read_adapter
from gptoss_ft.export.calibrate import Calibration, Progress
from gptoss_ft.export.cures import Limits
from gptoss_ft.export.gguf_layout import q8_0_weights, through_q8_0
from gptoss_ft.export.journal import Journal, digest, remove_journals
from gptoss_ft.export.merge import MERGE_FILE, merge
from gptoss_ft.export.merge_record import merge_record, noted_in
from gptoss_ft.export.merged import MergedWeights, PackedUpdate, Rounded, row_workers, tensor_digest
from gptoss_ft.export.streams import Streams
from gptoss_ft.kernels.reference import clamped_swiglu, dequantize_mxfp4
from gptoss_ft.model.checkpoint import Checkpoint
from gptoss_ft.model.experts import PROJECTIONS
from gptoss_ft.model.load import load_base
from gptoss_ft.mxfp4.calibrated import MIN_INPUTS
from gptoss_ft.mxfp4.round import UpdateStats
from gptoss_ft.training.run_folder import write_json

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


@pytest.fixture
def paired(small_bases, adapter):
    """Base and updates, and what `Streams` and `Calibration` are made of beside the samples."""
    base = Checkpoint.open(small_bases["mxfp4"])
    deltas = read_adapter(adapter, base.spec)
    return base, deltas


@pytest.mark.parametrize("format", ["mxfp4", "gguf_q8_0"])
def test_the_inputs_are_those_of_two_whole_forward_passes(trained, paired, samples, format, tmp_path, monkeypatch):
    """Experts are written as a merge to nearest makes them; its file is then run as a whole."""
    base, deltas = paired
    # Whatever the router is corrected to, experts get what it chooses then.
    monkeypatch.setattr(
        "gptoss_ft.export.streams.router_correction",
        lambda _, merged, *rows: {"bias": merged.bias.data + torch.linspace(-1, 1, 4).bfloat16()},
    )
    q8_0 = q8_0_weights(base.spec, format)
    merge(base, deltas, tmp_path / "merged", format="mxfp4", progress=False)
    merged = load_base(tmp_path / "merged")
    # Another bias is passed on too.
    merged.model.layers[0].mlp.experts.down_proj_bias.data = merged.model.layers[0].mlp.experts.down_proj_bias + 0.5
    for name, parameter in merged.named_parameters():
        if name in q8_0:
            parameter.data = through_q8_0(parameter.data).bfloat16()

    numbers = torch.arange(sum(map(len, samples))).split(list(map(len, samples)))
    weights = [row.tolist() for row in numbers]
    streams, recorded = Streams(trained, base, deltas, samples, q8_0, weights=weights), []
    for layer in merged.model.layers:
        streams.advance()
        # What was corrected belongs to the merged model.
        for name, values in streams.corrected.items():
            merged.get_parameter(name).data = through_q8_0(values).bfloat16() if name in q8_0 else values
        inputs = {"gate_up_proj": streams.inputs("gate_up_proj")}
        for projection in PROJECTIONS:
            parts = [getattr(layer.mlp.experts, f"{projection}_{part}") for part in ("blocks", "scales", "bias")]
            for expert in range(base.spec.num_local_experts):
                streams.write(projection, expert, Rounded(*(part[expert] for part in parts), UpdateStats()))
        recorded.append({**inputs, "down_proj": streams.inputs("down_proj")})
    assert "model.layers.1.mlp.router.bias" in streams.corrected

    models = {"trained": trained.get_base_model(), "merged": merged}
    residuals = {name: [[] for _ in model.model.layers] for name, model in models.items()}
    for layers, name in ((trained.get_base_model().model.layers, "trained"), (merged.model.layers, "merged")):
        for layer, calls in zip(layers, residuals[name], strict=True):
            # Of the trained model what a layer puts out, of the merged one what its experts' outputs are added to.
            if name == "trained":
                layer.register_forward_hook(lambda _, args, out, calls=calls: calls.append(out[0]))
            else:
                layer.post_attention_layernorm.register_forward_hook(
                    lambda _, args, out, calls=calls: calls.append(args[0][0])
                )
    seen = {name: [[] for _ in model.model.layers] for name, model in models.items()}
    for name, model in models.items():
        for layer, calls in zip(model.model.layers, seen[name], strict=True):
            layer.mlp.experts.register_forward_pre_hook(lambda _, args, calls=calls: calls.append(args))
        outputs(model, samples)
    for number, found in enumerate(recorded):
        hidden = {name: torch.cat([call[0] for call in calls[number]]) for name, calls in seen.items()}
        experts_TK = torch.cat([call[1] for call in seen["merged"][number]])
        routing_TK = torch.cat([call[2] for call in seen["merged"][number]])
        with torch.no_grad():
            out_TH = models["trained"].model.layers[number].mlp.experts(hidden["trained"], experts_TK, routing_TK)
        wanted_TH, before_TH = (torch.cat(residuals[name][number]).double() for name in models)
        stack = f"model.layers.{number}.mlp.experts.gate_up_proj"
        for expert in range(base.spec.num_local_experts):
            chosen_N = (experts_TK == expert).nonzero()[:, 0]
            *gate_up, left, numbers_N = found["gate_up_proj"].of(expert)
            assert left is None and torch.equal(numbers_N, chosen_N)
            gate_up = dict(zip(models, gate_up, strict=True))
            # Sums of all rows at once are in another order than those of a row.
            for name in models:
                assert (gate_up[name].double() - hidden[name][chosen_N]).norm() < 0.01 * hidden[name].double().norm()
            assert torch.equal(gate_up["trained"], hidden["trained"][chosen_N])
            trained_OK = dequantize_mxfp4(*packed_of(base, stack, expert), torch.float64)
            trained_OK += deltas[stack].scaling * (deltas[stack].B[expert].double() @ deltas[stack].A[expert].double())
            merged_OK = dequantize_mxfp4(*packed_of(Checkpoint.open(tmp_path / "merged"), stack, expert), torch.float64)
            bias_O = base.tensor(f"{stack}_bias")[expert].double()
            *down, left_NH, numbers_N = found["down_proj"].of(expert)
            assert torch.equal(numbers_N, chosen_N)
            for x, weight_OK, act_NI in zip(gate_up.values(), (trained_OK, merged_OK), down, strict=True):
                wanted_NI = clamped_swiglu(x.double() @ weight_OK.T + bias_O, alpha=1.702, limit=7.0)
                # bf16 products and their rounding.
                assert (act_NI.double() - wanted_NI).norm() < 0.01 * wanted_NI.norm()
                assert len(act_NI) > 0
            # With this from each of its experts, whose weights add up to one, a token has what the trained layer gives.
            had_NH = before_TH[chosen_N] + out_TH[chosen_N] + left_NH
            assert (had_NH - wanted_TH[chosen_N]).norm() < 0.01 * wanted_TH.norm()


def packed_of(checkpoint, stack, expert):
    return [checkpoint.tensor(f"{stack}_{part}")[expert] for part in ("blocks", "scales")]


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
        bias = base.tensor(f"{stack}_bias")[expert]
        update = PackedUpdate(
            blocks, scales, bias, lambda rows: delta.scaling * delta.B[expert][rows] @ delta.A[expert]
        )
        with row_workers() as pool:
            return calibration(name, expert, update, pool)

    return ask


def test_layers_are_asked_for_in_rising_order(trained, paired, samples, ask):
    calibration = Calibration(trained, *paired, samples)
    assert ask(calibration, "model.layers.1.mlp.experts.down_proj", 0) is not None
    assert ask(calibration, "model.layers.1.mlp.experts.gate_up_proj", 0) is not None
    with pytest.raises(RuntimeError, match="asked for after layer 1"):
        ask(calibration, "model.layers.0.mlp.experts.gate_up_proj", 0)
    with pytest.raises(ValueError, match="no stack of experts"):
        ask(calibration, "model.layers.1.self_attn.q_proj.weight", 0)


def test_only_the_chosen_experts_are_calibrated(trained, paired, samples, ask):
    calibration = Calibration(trained, *paired, samples, layers={1}, experts={0, 3})
    asked = [(layer, expert) for layer in range(2) for expert in range(4)]
    done = [ask(calibration, f"model.layers.{layer}.mlp.experts.down_proj", expert) for layer, expert in asked]
    assert [place for place, found in zip(asked, done, strict=True) if found] == [(1, 0), (1, 3)]


def test_experts_are_rounded_for_what_counts(trained, paired, samples, ask):
    name = "model.layers.0.mlp.experts.gate_up_proj"
    weights = [[1.0 if place % 3 == 0 else 0.01 for place in range(len(row))] for row in samples]
    plain, same, weighted = (
        ask(Calibration(trained, *paired, samples, weights=given), name, 1) for given in (None, None, weights)
    )
    assert torch.equal(plain.blocks, same.blocks) and torch.equal(plain.bias, same.bias)
    assert not torch.equal(plain.blocks, weighted.blocks) and not torch.equal(plain.bias, weighted.bias)


def test_a_journal_gives_back_what_was_noted_and_nothing_else(trained, paired, samples, ask, tmp_path):
    name = "model.layers.1.mlp.experts.gate_up_proj"
    journal = Journal(tmp_path / "out", "a" * 64)
    blocks, scales, bias, stats = ask(Calibration(trained, *paired, samples, journal=journal), name, 1)
    assert journal.num_weights == 1

    again = Calibration(trained, *paired, samples, journal=Journal(tmp_path / "out", "a" * 64))
    again.streams.inputs = None  # nothing is rounded
    found = ask(again, name, 1)
    assert all(map(torch.equal, found[:3], (blocks, scales, bias))) and found.stats == stats

    # Another base of the same key: it was written by a program that gives zeros another sign, say.
    base = trained.get_base_model().model.layers[1].mlp.experts.get_base_layer()
    base_blocks, base_scales = base.gate_up_proj_blocks[1], base.gate_up_proj_scales[1]
    update = PackedUpdate(base_blocks, base_scales, base.gate_up_proj_bias[1], lambda rows: rows)
    assert not torch.equal(bias, update.bias)
    assert torch.equal(journal.read(name, 1, update).blocks, blocks)
    assert journal.read(name, 1, replace(update, blocks=base_blocks ^ 8)) is None
    assert journal.read(name, 1, replace(update, bias=update.bias + 1)) is None

    (file,) = journal.folder.iterdir()
    for broken in (b"", file.read_bytes()[:-5]):
        file.write_bytes(broken)
        assert journal.read(name, 1, update) is None
    other = Journal(tmp_path / "out", "b" * 64)
    assert other.num_weights == 0 and other.read(name, 1, update) is None
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


def test_a_journal_needs_a_folder_with_a_name():
    with pytest.raises(UserError, match=r"out=\. is a folder that exists"):
        Journal(Path("."), "a" * 64)


def test_the_digest_is_of_every_part():
    assert digest(["x", [1, 2]]) == digest(["x", [1, 2]])
    assert len({digest(parts) for parts in (["x", [1, 2]], ["x", [1, 3]], [[1, 2], "x"])}) == 3


def test_the_estimate_is_that_of_the_first_expert(capsys):
    update = PackedUpdate(torch.empty(10, 3, 16), torch.empty(10, 3), torch.empty(10), lambda rows: rows)
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
    report = merge(
        base,
        deltas,
        tmp_path / "few",
        format="mxfp4",
        calibrate=Calibration(trained, base, deltas, few, all_rows=True),
        progress=False,
    )
    merge(base, deltas, tmp_path / "nearest", format="mxfp4", progress=False)
    assert (report.num_calibrated, report.num_nearest) == (0, 2 * 2 * 3)
    assert "held-out" not in str(report) and "none of 12 weights of trained experts was rounded for its" in str(report)
    assert (
        "12 weights of experts were rounded to nearest: 12 had fewer than 64 inputs (6 in layer 0, 6 in layer 1) of all"
        in str(report)
    )
    assert report.to_dict()["rounding"] == "nearest"
    write_json(tmp_path / "few" / MERGE_FILE, merge_record(base, "adapter", report, None))
    noted = noted_in(tmp_path / "few")
    assert noted.asked_for is Rounding.calibrated and noted.limits == Limits(all_rows=True)
    first, second = (Checkpoint.open(tmp_path / folder) for folder in ("few", "nearest"))
    assert all(torch.equal(first.tensor(name), second.tensor(name)) for name in base.names())


def test_a_report_tells_which_experts_were_rounded_to_nearest_and_why(trained, paired, samples, tmp_path):
    base, deltas = paired
    chosen = []
    router = trained.get_base_model().model.layers[0].mlp.router
    hook = router.register_forward_hook(lambda _, args, out: chosen.append(out[2]))
    outputs(trained, samples[:2])
    hook.remove()
    counts = torch.cat(chosen).flatten().bincount(minlength=4).tolist()
    few = [expert for expert in (0, 1, 3) if counts[expert] < MIN_INPUTS]
    assert 0 < len(few) < 3

    calibrate = Calibration(trained, base, deltas, samples[:2], layers={0})
    report = merge(base, deltas, tmp_path / "out", format="mxfp4", calibrate=calibrate, progress=False)
    content = report.to_dict()
    names = [f"model.layers.0.mlp.experts.{projection}" for projection in PROJECTIONS]
    assert report.corrected and all(".layers.0.mlp.experts." in name for name in report.corrected)
    assert content["experts_with_few_inputs"] == dict.fromkeys(names, few)
    assert content["rounding"] == "calibrated and nearest"
    assert content["num_weights_to_nearest"] == 2 * len(few) + 6
    assert [sorted(map(int, content["calibrated_experts"][name])) for name in names] == [
        [expert for expert in (0, 1, 3) if expert not in few]
    ] * 2
    reason = f"{2 * len(few)} had fewer than 64 inputs ({2 * len(few)} in layer 0): raise calibration_tokens; 6 are not"
    assert content["limits_of_calibration"] == {"restricted": True, "all_rows": False}
    assert f"{2 * len(few) + 6} weights of experts were rounded to nearest: {reason} among the chosen" in str(report)


@pytest.mark.parametrize("layout", ["mxfp4", "original"])
def test_calibrated_outputs_are_nearer_to_the_trained_model(trained, small_bases, adapter, samples, layout, tmp_path):
    base = Checkpoint.open(small_bases[layout])
    deltas = read_adapter(adapter, base.spec)
    wanted = outputs(trained, samples)
    reports, distances = {}, {}
    for rounding in ("nearest", "calibrated"):
        calibrate = Calibration(trained, base, deltas, samples) if rounding == "calibrated" else None
        out = tmp_path / rounding
        reports[rounding] = merge(base, deltas, out, format="mxfp4", calibrate=calibrate, progress=False)
        distances[rounding] = (outputs(load_base(out), samples) - wanted).norm()
        merged = Checkpoint.open(out)
        dense = [name for name in base.spec.tensors() if not name.endswith(("_blocks", "_scales"))]
        changed = [name for name in dense if not torch.equal(merged.tensor(name), base.tensor(name))]
        assert sorted(changed) == sorted(reports[rounding].corrected)
        attention = {f"model.layers.1.self_attn.{name}_proj.{part}" for name in "qkv" for part in ("weight", "bias")}
        biases = {name for name in dense if name.endswith("_bias")}
        router = {f"model.layers.1.mlp.router.{part}" for part in ("weight", "bias")}
        if rounding == "calibrated":
            # Whether the router gains depends on the last digits here.
            assert biases | attention <= set(changed) <= biases | attention | router
        else:
            assert not changed
        assert {name: tensor_digest(merged.tensor(name)) for name in changed} == reports[rounding].corrected
        for layer in range(base.spec.num_hidden_layers):
            for part in (f"{name}_{part}" for name in PROJECTIONS for part in ("blocks", "scales", "bias")):
                name = f"model.layers.{layer}.mlp.experts.{part}"
                assert torch.equal(merged.tensor(name)[UNTRAINED], base.tensor(name)[UNTRAINED])
    assert distances["calibrated"] < 0.6 * distances["nearest"]
    report = reports["calibrated"]
    assert (report.num_calibrated, report.num_nearest) == (2 * 2 * 3, 0)
    assert "12 of 12 weights of trained experts rounded for their inputs: on held-out ones" in str(report)
    assert "to nearest" not in str(report)
    assert [reports[rounding].to_dict()["rounding"] for rounding in reports] == list(reports)
    assert report.to_dict()["overall"]["output_error"] < 0.6
    assert reports["nearest"].to_dict()["overall"]["output_error"] is None
    assert all(stats.output_error for stats in report.updates.values())


def test_biases_may_be_asked_for_after_later_layers(trained, paired, samples):
    """Files have tensors of odd sizes last, which biases of small heads are."""
    base, deltas = paired
    calibrate = Calibration(trained, base, deltas, samples)
    with row_workers() as pool:
        list(MergedWeights(base, deltas, pool, calibrate).packed_experts("model.layers.0.mlp.experts.gate_up_proj"))
        corrected = calibrate.corrected("model.layers.1.self_attn.q_proj.bias")
        calibrate.streams.number = 2
        assert corrected is not None and calibrate.corrected("model.layers.1.self_attn.q_proj.bias") is corrected
        assert calibrate.corrected("model.layers.0.self_attn.q_proj.bias") is None
        with pytest.raises(RuntimeError, match="layer 1 was asked for after layer 2"):
            calibrate.corrected("model.layers.1.self_attn.q_proj.weight")


@pytest.mark.parametrize("format", ["mxfp4", "gguf_q8_0"])
def test_a_merge_that_goes_on_where_another_stopped_writes_the_same(trained, paired, samples, format, tmp_path):
    base, deltas = paired
    journal = Journal(tmp_path / "out", "a" * 64)
    q8_0 = q8_0_weights(base.spec, format)

    def merged(name):
        calibrate = Calibration(trained, base, deltas, samples, journal=journal, q8_0=q8_0)
        report = merge(base, deltas, tmp_path / name, format=format, calibrate=calibrate, progress=False)
        return report, {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}

    first, files = merged("first")
    assert "model.layers.1.self_attn.v_proj.weight" in first.corrected
    noted = sorted(journal.folder.iterdir())
    for file in noted[len(noted) // 2 :]:
        file.unlink()
    again, files_again = merged("again")
    assert again == first and files_again == files
