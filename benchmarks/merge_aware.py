"""What reaches the merged MXFP4 model: training and merging after it, beside training through the merge.

    python benchmarks/merge_aware.py [--steps 40] [--rates 2e-4 1e-3 5e-3] [--seed 0] [--targets experts] [--work DIR]
        [--json]

The quickstart's rows, model and held-out rows. At each learning rate both kinds of training take the same steps from
the same initial numbers; the first kind is exported with rounding=nearest and with rounding=calibrated, and merged by
the rounding of the second kind. Every number is the held-out loss in nats per token, in fp32: of the base, of the
trained model beside its adapter, of its three merges, and of the merged model of merge-aware training, which is its
trained model. `update` is |D| / |W| over the experts.
"""

import argparse
import contextlib
import json
import sys
import tempfile
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import GptOssForCausalLM

from gptoss_ft.adapters.save import load_adapter
from gptoss_ft.config.load import load_train_config
from gptoss_ft.config.schema import TrainConfig
from gptoss_ft.export.adapter import read_adapter
from gptoss_ft.export.merge import merge
from gptoss_ft.model.checkpoint import Checkpoint
from gptoss_ft.model.load import load_base
from gptoss_ft.recipes import qat, sft
from gptoss_ft.recipes.export import Calibrated, export_run
from gptoss_ft.recipes.samples import held_out_samples

CALIBRATION_TOKENS = 8192
COLUMNS = (
    *("rate", "update", "base", "trained", "nearest", "calibrated", "dithered"),
    *("merge_aware", "merge_aware_update"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rates", nargs="+", default=["2e-4", "1e-3", "5e-3"])
    parser.add_argument("--seed", type=int, default=0, help="of the adapters' initial weights and the order of rows")
    parser.add_argument("--targets", nargs="+", default=["experts"])
    parser.add_argument("--work", type=Path, help="folder for the runs; by default a temporary one")
    parser.add_argument("--json", action="store_true", help="print one line of JSON last")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        results = []
        print("  ".join(f"{column:>18}" for column in COLUMNS))
        for rate in args.rates:
            with contextlib.redirect_stdout(sys.stderr):
                found = compare(work, rate, args.steps, args.targets, args.seed)
            results.append(found)
            print("  ".join(f"{found[column]:18.5g}" for column in COLUMNS), flush=True)
    if args.json:
        print(json.dumps({"steps": args.steps, "seed": args.seed, "targets": args.targets, "results": results}))


def compare(work: Path, rate: str, steps: int, targets: list[str], seed: int) -> dict[str, float]:
    """Both trainings at one learning rate."""

    def config(name: str, preset: str) -> TrainConfig:
        words = [f"config={preset}", f"run.dir={work / f'{name}-{rate}'}", f"model.path={work / 'base'}"]
        words += [f"trainer.max_steps={steps}", f"trainer.learning_rate={rate}", "export.formats=[]", f"seed={seed}"]
        return load_train_config([*words, f"adapter.targets=[{','.join(targets)}]"])

    after, aware = config("after", "quickstart"), config("aware", "qat_tiny")
    run, aware_run = sft.main(after), qat.main(aware)
    nearest = export_run(run, "mxfp4", run / "nearest")
    calibrated = export_run(run, "mxfp4", run / "calibrated", calibrated=Calibrated(CALIBRATION_TOKENS))
    base = Checkpoint.open(after.model.path)
    dithered = run / "dithered"
    merge(base, read_adapter(run / "adapter", base.spec), dithered, format="mxfp4", merged_training=True)
    merged = export_run(aware_run, "mxfp4", aware_run / "export" / "mxfp4")
    trained, _ = load_adapter(load_base(after.model.path, dtype=torch.float32), run / "adapter")
    losses = {
        "base": held_out_loss(load_base(after.model.path, dtype=torch.float32), after),
        "trained": held_out_loss(trained, after),
        **{
            name: held_out_loss(load_base(folder, dtype=torch.float32), after)
            for name, folder in (
                *(("nearest", nearest), ("calibrated", calibrated), ("dithered", dithered)),
                ("merge_aware", merged),
            )
        },
    }
    (report,) = run.glob("merge-mxfp4-nearest-*.json")
    return {
        "rate": float(rate),
        "update": relative_update(report),
        **losses,
        "merge_aware_update": relative_update(aware_run / "merge-mxfp4.json"),
    }


def relative_update(report: Path) -> float:
    """|D| / |W| of the unrounded updates that an export merged."""
    return float(json.loads(report.read_text())["overall"]["relative_update"])


def held_out_loss(model: GptOssForCausalLM, cfg: TrainConfig) -> float:
    """Nats per token that carries loss, over all held-out rows."""
    total = count = 0.0
    for sample in held_out_samples(cfg.data, cfg.seed):
        ids, labels = (torch.as_tensor(values, dtype=torch.int64) for values in (sample.input_ids, sample.labels))
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1]
        total += cross_entropy(logits, labels[1:], reduction="sum").item()
        count += int((labels[1:] >= 0).sum())
    return total / count


if __name__ == "__main__":
    main()
