"""Seconds and memory of one LoRA step of gpt-oss-20b's shape, through the functions that `gptoss-ft train` runs.

    python benchmarks/step_20b.py [--tokens 512] [--base DIR] [--layers 24] [--steps 3] [--json]

24 layers with random weights, packed MXFP4 experts, LoRA r=16 on attention and every expert, the whole head, AdamW.
Activations are recomputed above 1024 tokens. One row of exactly `--tokens` tokens, nearly all with loss; another row
for every step. The base checkpoint is written to `--base` if it is not there (13.8 GB, some minutes).

    seconds         the fastest step after the first, by the clock, optimiser included
    share_of_peak   useful arithmetic of a step over what registers alone could do in that time
    private_gb      most anonymous memory the process held: adapters, gradients, optimiser, activations
    mapped_gb       of the checkpoint, resident at the end: read in place, and the system may drop it at any time
    load_s, load_private_gb   loading the base

Useful arithmetic: forward and input gradients of every frozen product (and forward again where activations are
recomputed), three products for each LoRA matrix, attention's two forward and five backward products over the pairs of
positions that see each other.
"""

import argparse
import json
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from gemm import peak_gflops
from transformers import TrainerCallback

from gptoss_ft.config.load import load_train_config
from gptoss_ft.data.dataset import compile_samples
from gptoss_ft.harmony.vocabulary import decode, encode
from gptoss_ft.kernels import cpu_library
from gptoss_ft.model.init import init_checkpoint
from gptoss_ft.model.spec import SPECS, GptOssSpec
from gptoss_ft.recipes import sft
from gptoss_ft.training.run_folder import RunFolder

RANK = 16
RECOMPUTE_ABOVE = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--base", type=Path, default=Path("runs/base_20b"), help="checkpoint, written if missing")
    parser.add_argument("--layers", type=int, default=24, help="fewer make a quicker look, not the benchmark")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one line of JSON last")
    args = parser.parse_args()

    spec = replace(SPECS["gpt_oss_20b"], num_hidden_layers=args.layers)
    if not args.base.exists():
        init_checkpoint(spec, args.base)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(spec, args.base, args.tokens, args.steps, Path(folder))
    for name, value in result.items():
        print(f"{name:16} {value:.4g}")
    if args.json:
        print(json.dumps({name: round(value, 4) for name, value in result.items()}))


def measure(spec: GptOssSpec, base_path: Path, tokens: int, steps: int, folder: Path) -> dict[str, float]:
    rows = folder / "rows.jsonl"
    exact_rows(tokens, steps, rows)
    recompute = tokens > RECOMPUTE_ABOVE
    cfg = load_train_config(
        [
            "config=lora_20b",
            f"model.path={base_path}",
            f"data.path={rows}",
            f"run.dir={folder / 'run'}",
            f"adapter.r={RANK}",
            f"trainer.max_steps={steps}",
            "trainer.gradient_accumulation_steps=1",
            "trainer.optim=adamw_torch",
            f"trainer.gradient_checkpointing={str(recompute).lower()}",
        ]
    )
    train_set, _ = sft.build_datasets(cfg.data, cfg.seed)
    lengths = {len(sample["input_ids"]) for sample in train_set}
    assert lengths == {tokens}, lengths
    num_loss_tokens = sum(label >= 0 for label in train_set[0]["labels"][1:])

    process, before = psutil.Process(), anonymous_bytes()
    start = time.perf_counter()
    base = sft.prepare_base(cfg.model, cfg.seed)
    load_s, load_private = time.perf_counter() - start, anonymous_bytes() - before

    run = RunFolder(cfg.run.dir)
    run.path.mkdir()
    trainer = sft.make_trainer(sft.attach(base, cfg.adapter, cfg.seed), train_set, None, run, cfg.trainer, cfg.seed)
    clock = StepClock()
    trainer.add_callback(clock)
    with most(anonymous_bytes) as private:
        sft.train(trainer, None)
    memory = process.memory_info()
    seconds = min(clock.seconds[1:] or clock.seconds)
    # Other work can only lower it.
    peak = max(peak_gflops(cpu_library.selected_isa(), torch.get_num_threads()) for _ in range(5))
    return {
        "seconds": seconds,
        "share_of_peak": 1e-9 * useful_flops(spec, tokens, num_loss_tokens, recompute=recompute) / seconds / peak,
        "private_gb": private() / 1e9,
        "mapped_gb": memory.shared / 1e9,
        "load_s": load_s,
        "load_private_gb": load_private / 1e9,
        "tokens": tokens,
        "tokens_per_s": tokens / seconds,
        "peak_gflops": peak,
    }


class StepClock(TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self.start)


def exact_rows(tokens: int, count: int, path: Path) -> None:
    """Write `count` rows in the messages format that compile to exactly `tokens` tokens each."""

    def write(texts: Sequence[str]) -> None:
        rows = [
            {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]} for text in texts
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    write(["a"])
    around = len(compile_samples([path], max_length=tokens).samples[0].input_ids) - len(encode("a"))
    write([text_of(tokens - around, seed) for seed in range(count)])


def text_of(num_tokens: int, seed: int) -> str:
    """Random English-looking words that encode to exactly `num_tokens` tokens."""
    generator = random.Random(seed)
    words = [decode([generator.randrange(1000, 100_000)]) for _ in range(8 * num_tokens)]
    text = "a"
    for word in (word for word in words if word.isascii() and word.strip().isalpha()):
        longer = f"{text} {word.strip().lower()}"
        if len(encode(longer)) > num_tokens:
            break
        text = longer
    while len(encode(text)) < num_tokens:
        text += " a"
    return text


def useful_flops(spec: GptOssSpec, tokens: int, num_loss_tokens: int, *, recompute: bool) -> float:
    """Floating-point operations of one step, as the file's beginning counts them."""
    H, I = spec.hidden_size, spec.intermediate_size
    q, kv = spec.num_attention_heads * spec.head_dim, spec.num_key_value_heads * spec.head_dim
    attention, experts = [(H, q), (H, kv), (H, kv), (q, H)], spec.num_experts_per_tok * [(H, 2 * I), (I, H)]
    frozen = sum(i * o for i, o in attention + experts)
    adapters = sum(RANK * (i + o) for i, o in attention + experts)
    passes = 3 if recompute else 2
    seen = {
        kind: visible_pairs(tokens, window) for kind, window in (("full", tokens), ("sliding", spec.sliding_window))
    }
    pairs = sum(seen["sliding" if layer % 2 == 0 else "full"] for layer in range(spec.num_hidden_layers))
    linear = tokens * spec.num_hidden_layers * (passes * frozen + (passes + 1) * adapters)
    head = 2 * num_loss_tokens * spec.vocab_size * H
    return 2.0 * (linear + head + (2 * (passes - 1) + 5) * pairs * q)


def visible_pairs(tokens: int, window: int) -> int:
    return sum(min(position + 1, window) for position in range(tokens))


def anonymous_bytes() -> int:
    """What this process holds in memory that is no file's."""
    memory = psutil.Process().memory_info()
    return memory.rss - memory.shared


@contextmanager
def most(measure: Callable[[], int]) -> Iterator[Callable[[], int]]:
    """Sample `measure` on a thread meanwhile; gives a function that tells the highest value."""
    highest, done = [measure()], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            highest[0] = max(highest[0], measure())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield lambda: highest[0]
    finally:
        done.set()
        watcher.join()


if __name__ == "__main__":
    main()
