"""Greedy generation in tokens/s with a KV cache: the product's model, and llama.cpp on the same weights.

    python benchmarks/generate.py [--layers 4] [--tokens 32] [--threads 1] [--folder DIR] [--profile] [--json]

A random checkpoint of gpt-oss-20b's dimensions with the given number of layers (24 is the whole model: 14 GB twice, as
safetensors and as GGUF). Ours is `load_base` with packed experts and transformers' `generate`; llama.cpp has its
default options. Both have the same prompt and number of threads. Each side runs in a process of its own, one after the
other, because the whole model need fit into memory only once: it reads its file into the page cache, generates once to
warm up, and then round by round. The first token, which the prompt is read for, is timed apart.

Speed is by the clock, so the machine must be quiet: threads of both programs spin while they wait, which leaves no
meaning to processor time. Major faults of the timed rounds are shown; with more than a few, pages of the file were
taken away and read again, and what was measured is the disk.
"""

import argparse
import json
import logging
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import llama_cpp as library
import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers.generation import BaseStreamer

from gptoss_ft.export.gguf_layout import MODEL_FILE
from gptoss_ft.export.merge import merge
from gptoss_ft.harmony import vocabulary
from gptoss_ft.model.checkpoint import Checkpoint
from gptoss_ft.model.init import init_checkpoint
from gptoss_ft.model.load import load_base
from gptoss_ft.model.spec import SPECS

PROMPT = "Explain why the sky is blue, in a few short sentences. " * 4


class Seconds(NamedTuple):
    """Until the first token, and the mean of the others."""

    prompt: float
    token: float


@dataclass
class Clock:
    """The moments at which tokens appeared."""

    at_first_token: Callable[[], object] | None = None

    def __post_init__(self) -> None:
        self.moments: list[float] = []
        self.tick()

    def tick(self) -> None:
        self.moments.append(time.perf_counter())
        if len(self.moments) == 2 and self.at_first_token:
            self.at_first_token()

    def seconds(self) -> Seconds:
        (start, first, *_), last = self.moments, self.moments[-1]
        return Seconds(first - start, (last - first) / (len(self.moments) - 2))


Generate = Callable[..., Clock]
"""`(prompt, num_tokens)`; ours also takes what to call at the first token."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, help="keep the checkpoints here, and use those that are here already")
    parser.add_argument("--profile", action="store_true", help="show where our time goes, by operation")
    parser.add_argument("--json", action="store_true", help="print one line of JSON last")
    parser.add_argument("--side", choices=SIDES, help="measure this side only, in this process")
    parser.add_argument("--model", type=Path, help="what --side is to load")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.side:
        print(json.dumps(measure(args)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        base, gguf = checkpoints(args.folder or Path(temporary), args.layers)
        print(f"{len(prompt_ids())} tokens of prompt, {args.tokens} generated, {args.threads} threads")
        mine, theirs = (in_process(side, model) for side, model in (("ours", base), ("llama.cpp", gguf)))
        result = {
            "prompt_s": round(mine.prompt, 3),
            "prompt_s_llama_cpp": round(theirs.prompt, 3),
            "tokens_per_s_llama_cpp": round(1 / theirs.token, 3),
            "ratio_vs_llama_cpp": round(theirs.token / mine.token, 4),
            "tokens_per_s": round(1 / mine.token, 3),
        }
    if args.json:
        print(json.dumps(result))


def checkpoints(folder: Path, layers: int) -> tuple[Path, Path]:
    """The random checkpoint and the same as GGUF, written where they are not there yet."""
    base, gguf = folder / f"base-{layers}", folder / f"gguf-{layers}"
    if not base.exists():
        init_checkpoint(replace(SPECS["gpt_oss_20b"], num_hidden_layers=layers), base)
    if not gguf.exists():
        merge(Checkpoint.open(base), {}, gguf, format="gguf")
    return base, gguf / MODEL_FILE


def in_process(side: str, model: Path) -> Seconds:
    """Run this file with `--side`, show what it prints and return its last line."""
    command = [sys.executable, __file__, *sys.argv[1:], "--side", side, "--model", str(model)]
    *shown, last = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    print(*shown, sep="\n", flush=True)
    return Seconds(*json.loads(last))


def measure(args: argparse.Namespace) -> Seconds:
    """Medians over rounds, printed and returned."""
    read(args.model)
    with SIDES[args.side](args.model, args.threads) as generate:
        generate(prompt_ids(), 2)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
        measured = [generate(prompt_ids(), args.tokens).seconds() for _ in range(args.rounds)]
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt - faults
        medians = Seconds(*map(statistics.median, zip(*measured, strict=True)))
        rounds = ", ".join(f"{1 / seconds.token:.2f}" for seconds in measured)
        print(f"{args.side:10} {1 / medians.token:7.2f} tokens/s ({rounds})", end=" · ")
        print(f"prompt {medians.prompt:.2f} s · {faults} major faults")
        if args.profile and args.side == "ours":
            show_profile(generate, args.tokens)
    return medians


def read(model: Path) -> None:
    """Bring a file, or all files of a folder, into the page cache."""
    buffer = bytearray(2**24)
    for path in sorted(model.iterdir()) if model.is_dir() else [model]:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def prompt_ids() -> list[int]:
    start, message = vocabulary.START, vocabulary.MESSAGE
    return [start, *vocabulary.encode("user"), message, *vocabulary.encode(PROMPT), vocabulary.END]


@contextmanager
def ours(base: Path, _: int) -> Iterator[Generate]:
    model = load_base(base)
    # A check of every token for the end would be timed too.
    model.generation_config.eos_token_id = None

    class Ticks(BaseStreamer):
        """Told of the prompt and then of every token."""

        def __init__(self, clock: Clock) -> None:
            self.clock, self.seen_prompt = clock, False

        def put(self, value: Tensor) -> None:
            if self.seen_prompt:
                self.clock.tick()
            self.seen_prompt = True

        def end(self) -> None:
            pass

    def generate(prompt: list[int], num_tokens: int, at_first_token: Callable[[], object] | None = None) -> Clock:
        clock = Clock(at_first_token)
        options = {"do_sample": False, "use_cache": True, "max_new_tokens": num_tokens}
        model.generate(torch.tensor([prompt]), streamer=Ticks(clock), **options)
        return clock

    yield generate


@contextmanager
def peer(file: Path, threads: int) -> Iterator[Generate]:
    logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL + 1)
    model = library.llama_model_load_from_file(os.fsencode(file), library.llama_model_default_params())
    vocab_size = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))

    def generate(prompt: list[int], num_tokens: int) -> Clock:
        options = library.llama_context_default_params()
        options.n_ctx = len(prompt) + num_tokens
        options.n_threads = options.n_threads_batch = threads
        context = library.llama_init_from_model(model, options)
        clock = Clock()
        tokens = prompt
        for _ in range(num_tokens):
            buffer = (library.llama_token * len(tokens))(*tokens)  # the batch only points to it
            if status := library.llama_decode(context, library.llama_batch_get_one(buffer, len(tokens))):
                raise RuntimeError(f"llama.cpp failed to decode ({status})")
            logits = np.ctypeslib.as_array(library.llama_get_logits_ith(context, -1), (vocab_size,))
            tokens = [int(logits.argmax())]
            clock.tick()
        library.llama_free(context)
        return clock

    yield generate
    library.llama_model_free(model)


def show_profile(generate: Generate, num_tokens: int) -> None:
    """Where the time goes once the prompt has been read."""
    profiler = profile(activities=[ProfilerActivity.CPU])
    generate(prompt_ids(), num_tokens, profiler.start)
    profiler.stop()
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=40))


SIDES = {"ours": ours, "llama.cpp": peer}

if __name__ == "__main__":
    main()
