"""What reaches the merged MXFP4 model: training and each way to merge after it, beside training through the merge.

    python benchmarks/merge_aware.py [--steps 40] [--rates 2e-4 1e-3 5e-3] [--targets experts] [--tokens 8192]
        [--ablation] [--base FOLDER] [--seed 0] [--work DIR] [--json]

The quickstart's rows, model and held-out rows. At each learning rate both kinds of training take the same steps from
the same initial numbers. Every model is run on all held-out rows, in fp32:

    base          what was trained on: random weights, or the packed checkpoint given with --base
    trained       the first kind of training, its adapter beside the base
    nearest       the same, merged and each number of an expert rounded to nearest
    dithered      by a threshold of each number
    calibrated    for what the experts see of --tokens tokens of the training rows
    merge_aware   the second kind of training, merged: its trained model, so that it is 0 nats from that

With --ablation also what calibrated rounding is made of, each with all before it:

    rounding      experts, for the inputs of the trained model
    +biases       theirs take up the mean of what is missing
    +feedback     for the inputs of the merged model, where all layers before are rounded, and what these miss
    +layer        down_proj makes good what else its layer's output lacks
    +attention    queries, keys and values are corrected
    +router       it is corrected too
    calibrated    tokens of prompts count less

Loss is in nats for each token that carries some. KL is from the trained model of the first kind, mean and median over
one in four of these tokens, and `same_top` how often the most likely ones agree there. `update` is |D| / |W| over the
experts. With --ablation each rate takes 2 minutes of one core beside its trainings; OMP_NUM_THREADS=1 is best beside
other jobs.
"""

import argparse
import contextlib
import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GptOssForCausalLM

from gptoss_ft.adapters.save import load_adapter
from gptoss_ft.config.load import load_train_config, to_yaml
from gptoss_ft.config.schema import TrainConfig
from gptoss_ft.data.sample import Sample
from gptoss_ft.export.adapter import read_adapter
from gptoss_ft.export.calibrate import Calibration
from gptoss_ft.export.distance import Distances, quantile
from gptoss_ft.export.merge import merge
from gptoss_ft.export.merged import PackedUpdate, Rounded
from gptoss_ft.export.streams import PairedInputs
from gptoss_ft.model.checkpoint import Checkpoint
from gptoss_ft.model.load import load_base
from gptoss_ft.recipes import qat, sft
from gptoss_ft.recipes.export import Calibrated, calibration_samples, export_run
from gptoss_ft.recipes.samples import held_out_samples
from gptoss_ft.training.run_folder import RunFolder

COLUMNS = ("loss", "mean_kl", "median_kl", "same_top")
# Of the tokens that carry loss, one in so many is compared: logits of one are 0.8 MB, and fp64 is slow.
KL_STEP = 4
# What calibrated rounding has beside the rounding of weights, in the order in which `--ablation` adds it.
ABLATION = ("rounding", "+biases", "+feedback", "+layer", "+attention", "+router")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rates", nargs="+", default=["2e-4", "1e-3", "5e-3"])
    parser.add_argument("--targets", nargs="+", default=["experts"])
    parser.add_argument("--tokens", type=int, default=8192, help="that are calibrated on")
    parser.add_argument("--ablation", action="store_true", help="take calibrated rounding apart")
    parser.add_argument("--base", type=Path, help="packed checkpoint to start from; by default random weights")
    parser.add_argument("--seed", type=int, default=0, help="of the adapters' initial weights and the order of rows")
    parser.add_argument(
        "--work",
        type=Path,
        help="folder for the runs, where finished ones of the same config are used again, whatever version of the code "
        "trained them; merges are always made anew; by default a temporary one",
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON last")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        results = []
        for rate in args.rates:
            with contextlib.redirect_stdout(sys.stderr):
                found = compare(work, rate, args)
            results.append({"rate": float(rate), **found})
            print(f"rate {rate}, update {found['update']:.2%}, merge-aware {found['merge_aware_update']:.2%}")
            print(f"{'':12}" + "".join(f"{column:>11}" for column in COLUMNS))
            for way, numbers in found["models"].items():
                print(f"{way:12}" + "".join(f"{numbers[column]:11.4g}" for column in COLUMNS), flush=True)
    if args.json:
        settings = {name: getattr(args, name) for name in ("steps", "targets", "tokens", "seed", "ablation")}
        settings["base"] = args.base and args.base.name
        print(json.dumps({**settings, "results": results}))


def compare(work: Path, rate: str, args: argparse.Namespace) -> dict[str, Any]:
    """Both trainings at one learning rate, and all models that come of them."""
    base_path = args.base or work / "base"

    def config(name: str, preset: str) -> TrainConfig:
        words = [f"config={preset}", f"run.dir={work / f'{name}-{rate}'}", f"model.path={base_path}"]
        words += [f"trainer.max_steps={args.steps}", f"trainer.learning_rate={rate}", "export.formats=[]"]
        return load_train_config([*words, f"seed={args.seed}", f"adapter.targets=[{','.join(args.targets)}]"])

    after, aware = config("after", "quickstart"), config("aware", "qat_tiny")
    run, aware_run = finished(after) or sft.main(after), finished(aware) or qat.main(aware)
    with tempfile.TemporaryDirectory(dir=work) as merged:
        return models_of(run, aware_run, Path(merged), after, args)


def finished(cfg: TrainConfig) -> Path | None:
    """The folder of a run that has ended with this very config."""
    run = RunFolder(cfg.run.dir)
    same = run.adapter.is_dir() and run.config.read_text("utf-8") == to_yaml(sft.with_absolute_paths(cfg))
    return run.path if same else None


def models_of(
    run: Path, aware_run: Path, merged: Path, cfg: TrainConfig, args: argparse.Namespace
) -> dict[str, object]:
    """Every model that comes of two runs, merged into folders in `merged`, and what it does."""
    base_path = Path(cfg.model.path)
    folders = {
        "base": base_path,
        "nearest": export_run(run, "mxfp4", merged / "nearest"),
        "dithered": export_run(run, "mxfp4", merged / "dithered", dithered=True),
        **({way: merge_in_part(run, merged, cfg, way, args.tokens) for way in ABLATION} if args.ablation else {}),
        "calibrated": export_run(run, "mxfp4", merged / "calibrated", calibrated=Calibrated(args.tokens)),
        "merge_aware": export_run(aware_run, "mxfp4", merged / "merge_aware"),
    }
    samples = list(held_out_samples(cfg.data, cfg.seed))
    trained, _ = load_adapter(load_base(base_path, dtype=torch.float32), run / "adapter")
    wanted: list[Tensor] = []
    models = {"trained": measure(trained, wanted, samples)}
    del trained
    for way, folder in folders.items():
        models[way] = measure(load_base(folder, dtype=torch.float32), wanted, samples)
    return {
        "update": relative_update(folders["nearest"]),
        "merge_aware_update": relative_update(folders["merge_aware"]),
        "models": models,
    }


class InPart(Calibration):
    """Calibrated rounding as far as one of `ABLATION`."""

    def __init__(self, *arguments: object, way: str) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        parts = ABLATION[: ABLATION.index(way) + 1]
        self.keeps_biases = "+biases" not in parts
        if "+attention" not in parts:
            self.streams.layers = ()
        if "+router" not in parts:
            self.streams.correct_router = lambda layer: None  # type: ignore[method-assign]
        whole = self.streams.inputs

        def inputs(projection: str) -> PairedInputs:
            found = whole(projection)
            merged = found.merged if "+feedback" in parts else found.trained
            return replace(found, merged=merged, left=found.left if "+layer" in parts else None)

        self.streams.inputs = inputs  # type: ignore[method-assign]

    def __call__(self, name: str, expert: int, update: PackedUpdate, pool: ThreadPoolExecutor) -> Rounded | None:
        """As `Calibration` rounds it, but for the bias."""
        rounded = super().__call__(name, expert, update, pool)
        return rounded._replace(bias=update.bias) if rounded and self.keeps_biases else rounded


def merge_in_part(run: Path, merged: Path, cfg: TrainConfig, way: str, num_tokens: int) -> Path:
    """The folder of a merge by one row of the ablation, on the same rows as a calibrated export."""
    base = Checkpoint.open(cfg.model.path)
    deltas = read_adapter(run / "adapter", base.spec)
    model, _ = load_adapter(load_base(base.path), run / "adapter")
    samples = [sample.input_ids for sample in calibration_samples(cfg, num_tokens)[0]]
    calibrate = InPart(model, base, deltas, samples, way=way)
    merge(base, deltas, merged / way, format="mxfp4", calibrate=calibrate)
    return merged / way


def relative_update(export: Path) -> float:
    """|D| / |W| of the unrounded updates that an export merged."""
    return float(json.loads((export / "merge.json").read_text())["overall"]["relative_update"])


def measure(model: GptOssForCausalLM, wanted: list[Tensor], samples: list[Sample]) -> dict[str, float]:
    """Loss over all samples, and distance from `wanted`, logits `[P, V]` by sample; of the first model, its own."""
    losses, distances = [], []
    for number, sample in enumerate(samples):
        logits_LV, labels_L = scored(model, sample)
        losses.append(cross_entropy(logits_LV, labels_L, reduction="none"))
        if number == len(wanted):
            wanted.append(logits_LV[::KL_STEP].clone())
        distances.append(Distances.between(wanted[number], logits_LV[::KL_STEP]))
    found = Distances.join(distances)
    return {
        "loss": float(torch.cat(losses).mean()),
        "mean_kl": float(found.kl_nats.mean()),
        "median_kl": quantile(found.kl_nats, 0.5),
        "same_top": float(found.same_top.double().mean()),
    }


@torch.no_grad()
def scored(model: GptOssForCausalLM, sample: Sample) -> tuple[Tensor, Tensor]:
    """Logits `[L, V]` where the next token carries loss, and these tokens `[L]`."""
    ids, labels = (torch.as_tensor(values, dtype=torch.int64) for values in (sample.input_ids, sample.labels))
    (positions_L,) = (labels[1:] >= 0).nonzero(as_tuple=True)
    return model(input_ids=ids[None], logits_to_keep=positions_L).logits[0], labels[positions_L + 1]


if __name__ == "__main__":
    main()
