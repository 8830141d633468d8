"""Seconds and memory of a merge of gpt-oss-20b's shape with every expert trained, through `gptoss-ft export`'s merge.

    python benchmarks/merge_20b.py [--format mxfp4] [--base DIR] [--out DIR] [--layers 24] [--rank 8] [--json]
    python benchmarks/merge_20b.py --calibration-tokens 4096 --updated 1
    python benchmarks/merge_20b.py --verify

Random weights, and a random adapter on attention and every expert of all layers. The base checkpoint is written to
`--base` if it is not there (13.8 GB); what was merged is removed again (13.8 GB, as `bf16` 41.8 GB). Rounding is to
nearest, or with `--calibration-tokens` for inputs that the model has on so many random tokens, in rows of 512.
Whatever has no update is read back: a bit that is not the base's ends the benchmark. With `--verify`, a process of its
own does with the export what `gptoss-ft verify` does, on rows of random tokens: weights that are not what a merge makes
of this adapter, or other programs that read another model than ours, end it too. How much of a random update rounding
keeps is only said.

    seconds         calibrating, merging and writing, by the clock, with the hashes in manifest.json
    private_gb      most anonymous memory the process held: the adapter (twice where calibrated), what is being merged
    adapter_gb      the adapter's factors
    out_gb          what was written
    same_tensors    tensors without an update that have the base's bits
    corrections_seconds   where calibrated: correcting attention and router of one more layer, timed apart, since the
                    first has nothing before it to be corrected for
    verify_seconds, verify_private_gb   comparing every weight, and the logits of every program
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
from step_20b import anonymous_bytes, most

from gptoss_ft.adapters.attach import Targets, attach_adapters
from gptoss_ft.adapters.save import load_adapter, save_adapter
from gptoss_ft.data.sample import Sample
from gptoss_ft.export.absorb import attention_corrections, router_correction
from gptoss_ft.export.adapter import read_adapter
from gptoss_ft.export.calibrate import Calibration
from gptoss_ft.export.deltas import LowRankDelta
from gptoss_ft.export.gguf_layout import q8_0_weights
from gptoss_ft.export.gguf_read import GgufModel
from gptoss_ft.export.merge import MergeFormat, merge
from gptoss_ft.export.verify import open_export, verify_export
from gptoss_ft.export.weights import expert_weight
from gptoss_ft.model.checkpoint import Checkpoint
from gptoss_ft.model.init import init_checkpoint
from gptoss_ft.model.load import load_base
from gptoss_ft.model.spec import SPECS

T = TypeVar("T")

ROW_TOKENS = 512
CHUNK_ROWS = 4096
VERIFIED_ROWS, VERIFIED_TOKENS = 4, 64
FORMATS = ("mxfp4", "bf16", "original", "gguf", "gguf_q8_0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", choices=FORMATS, default="mxfp4")
    parser.add_argument("--base", type=Path, default=Path("runs/base_20b"), help="checkpoint, written if missing")
    parser.add_argument("--out", type=Path, default=Path("runs/merge_20b"), help="folder for what is merged")
    parser.add_argument("--layers", type=int, default=24, help="of a base that is written; fewer make a quicker look")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--updated", type=int, help="merge the updates of so many layers, the first ones; default all")
    parser.add_argument("--calibration-tokens", type=int, default=0)
    parser.add_argument("--verify", action="store_true", help="open the export with every program that can read it")
    parser.add_argument("--json", action="store_true", help="print one line of JSON last")
    args = parser.parse_args()
    if args.verify and (args.updated is not None or args.calibration_tokens):
        parser.error("--verify compares with the whole adapter, rounded to nearest")

    if not args.base.exists():
        init_checkpoint(replace(SPECS["gpt_oss_20b"], num_hidden_layers=args.layers), args.base)
    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(folder, "adapter")
        in_process(make_adapter, args.base, adapter, args.rank)
        result = measure(
            args.base, adapter, args.out, args.format, args.updated, args.calibration_tokens, verified=args.verify
        )
    for name, value in result.items():
        print(f"{name:16} {value:.4g}")
    if args.json:
        print(json.dumps({name: round(value, 4) for name, value in result.items()}))


def in_process(task: Callable[..., T], *args: Any) -> T:
    """Call a function in a process of its own, so that the memory it takes is not counted here, nor ours there."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(task, *args).result()


def make_adapter(base: Path, out: Path, rank: int) -> None:
    """An adapter of random factors on everything but the router."""
    spec = Checkpoint.open(base).spec
    targets = Targets.parse(["all"], num_layers=spec.num_hidden_layers, num_experts=spec.num_local_experts)
    model, _ = attach_adapters(load_base(base), targets, r=rank, alpha=2 * rank)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.002)
    save_adapter(model, out)


def measure(
    base: Path,
    adapter: Path,
    out: Path,
    format: MergeFormat,
    num_updated: int | None,
    num_tokens: int,
    *,
    verified: bool = False,
) -> dict[str, float]:
    with most(anonymous_bytes) as private:
        checkpoint = Checkpoint.open(base)
        deltas = read_adapter(adapter, checkpoint.spec)
        if num_updated is not None:
            deltas = {name: delta for name, delta in deltas.items() if int(name.split(".")[2]) < num_updated}
        start = time.perf_counter()
        calibrate = calibration(checkpoint, adapter, deltas, format, num_updated, num_tokens) if num_tokens else None
        try:
            report = merge(checkpoint, deltas, out, format=format, calibrate=calibrate)
            seconds = time.perf_counter() - start
            print(report)
            num_bytes = sum(file.stat().st_size for file in out.iterdir())
            num_same = check_the_rest(checkpoint, out, deltas.keys() | report.corrected.keys())
            verification = in_process(verify, base, adapter, out) if verified else {}
        finally:
            shutil.rmtree(out, ignore_errors=True)
    corrections = {"corrections_seconds": correct(checkpoint, num_tokens)} if num_tokens else {}
    factors = sum(delta.A.nbytes + delta.B.nbytes for delta in deltas.values())
    return {
        "seconds": seconds,
        "private_gb": private() / 1e9,
        "adapter_gb": factors / 1e9,
        "out_gb": num_bytes / 1e9,
        "same_tensors": num_same,
        **corrections,
        **verification,
    }


def verify(base: Path, adapter: Path, export: Path) -> dict[str, float]:
    vocab_size = Checkpoint.open(base).spec.vocab_size
    ids = torch.randint(vocab_size, (VERIFIED_ROWS, VERIFIED_TOKENS), generator=torch.Generator().manual_seed(1))
    samples = [Sample(row, [1.0] * len(row), f"random:{number}", 0) for number, row in enumerate(ids.tolist())]
    with most(anonymous_bytes) as private:
        start = time.perf_counter()
        report = verify_export(
            base=base, adapter=adapter, export=export, samples=samples, max_tokens=ids.numel(), min_fidelity=0
        )
        seconds = time.perf_counter() - start
    print(report)
    if not report.passed:
        raise SystemExit("the export did not pass")
    return {"verify_seconds": seconds, "verify_private_gb": private() / 1e9}


def check_the_rest(base: Checkpoint, out: Path, changed: Collection[str]) -> int:
    """Compare every tensor but the changed ones, experts of a bf16 export by their numbers; returns how many."""
    _, export = open_export(base, out)
    if isinstance(export, GgufModel):
        changed = {*changed, *export.rounded}
    num_same = 0
    for name, tensor in base.tensor_specs().items():
        weight = name.removesuffix("_blocks").removesuffix("_scales")
        if weight in changed or (export.layout == "bf16" and name.endswith("_scales")):
            continue
        # An expert, or as many rows of a matrix, at once.
        is_stack = len(tensor.shape) > 2
        rows = 1 if is_stack else CHUNK_ROWS
        for start in range(0, tensor.shape[0], rows):
            stop = min(start + rows, tensor.shape[0])
            if is_stack and export.layout == "bf16":
                pair = [expert_weight(model, weight, start) for model in (base, export)]
            else:
                pair = [model.read(name, start, stop) for model in (base, export)]
            # GGUF has norms, sinks and biases in fp32.
            wanted, found = (part if part.dtype == torch.uint8 else part.float().view(torch.int32) for part in pair)
            if not torch.equal(wanted, found):
                raise SystemExit(f"{name} has no update, and from row {start} on it is not what the base holds")
        num_same += 1
    return num_same


def calibration(
    base: Checkpoint,
    adapter: Path,
    deltas: Mapping[str, LowRankDelta],
    format: MergeFormat,
    num_updated: int | None,
    num_tokens: int,
) -> Calibration:
    model, _ = load_adapter(load_base(base.path), adapter)
    ids = torch.randint(model.config.vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(0))
    samples = [row.tolist() for row in ids.split(ROW_TOKENS)]
    # Layers whose updates are left out are not to be corrected towards a model that has them.
    layers = None if num_updated is None else range(num_updated)
    return Calibration(model, base, deltas, samples, layers=layers, q8_0=q8_0_weights(base.spec, format))


def correct(base: Checkpoint, num_tokens: int) -> float:
    """Seconds for the corrections of a layer that is given other inputs, of which all can be told from them."""
    layer = load_base(base.path).model.layers[0]
    generator = torch.Generator().manual_seed(0)
    inputs_TH = torch.randn(num_tokens, base.spec.hidden_size, generator=generator).bfloat16()
    trained = inputs_TH.split(ROW_TOKENS)
    merged = (inputs_TH + 0.1 * inputs_TH.roll(1, dims=1)).split(ROW_TOKENS)
    start = time.perf_counter()
    found = attention_corrections(layer, layer, *([row[None] for row in rows] for rows in (trained, merged)))
    found |= router_correction(layer.mlp.router, layer.mlp.router, trained, merged)
    seconds = time.perf_counter() - start
    print(f"{len(found)} weights and biases of another layer corrected in {seconds:.1f} s")
    return seconds


if __name__ == "__main__":
    main()
