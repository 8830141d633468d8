"""Sink attention of gpt-oss-20b, forward and backward, against transformers' eager: speed, share of peak, memory.

    python benchmarks/attention.py [--lengths 2048 8192] [--json]

One sequence, 64 query heads, 8 key/value heads of 64, bf16, full and sliding (128) attention. Arithmetic is counted as
the products of visible query-key pairs need it: two forward, five backward. Eager runs once, at the first length, for
the heads of one key/value head and is multiplied by 8: all heads take gigabytes. It does the same work for both kinds
of layer. Last, one query against a cache of each length, in GB/s of keys and values read.

Speed is by processor time over threads, which another job's use of the cores hardly changes. Memory is what forward and
backward add, results included, at the peak of a process of its own.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

# Waiting threads must sleep: spinning would count as processor time. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from gemm import peak_gflops
from torch import Tensor

from gptoss_ft.kernels import cpu_attention, cpu_library
from gptoss_ft.kernels.dispatch import sink_attention

# B batch · H query heads · K key/value heads · T queries · S keys · D head dimension
H, K, D = 64, 8, 64
WINDOWS = {"full": None, "sliding": 128}
SCALING = D**-0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="print one line of JSON last")
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.memory_of:
        print(added_bytes(args.memory_of))
        return

    isa = cpu_library.selected_isa()
    print(f"{isa}, {args.threads} threads, bf16; by processor time")
    result: dict[str, float] = {}
    for T in args.lengths:
        eager_s = time_of_eager(T, args.threads) * K if args.lengths[0] == T else None
        for kind, window in WINDOWS.items():
            forward_s, backward_s, peak = time_of_ours(T, window, isa, args)
            both_s = forward_s + backward_s
            gflop = 2e-9 * visible_pairs(T, window) * D * H
            shares = [gflop * n / s / peak for n, s in ((2, forward_s), (5, backward_s), (7, both_s))]
            line = f"{T:6} {kind:7} | forward {forward_s:6.3f} s ({shares[0]:4.0%} of {peak:.0f} GFLOP/s)"
            line += f" | backward {backward_s:6.3f} s ({shares[1]:4.0%}) | both {both_s:6.3f} s ({shares[2]:4.0%})"
            if eager_s is not None:
                line += f" | eager {eager_s:6.2f} s, {eager_s / both_s:5.1f} times ours"
            print(line, flush=True)
            if kind == "full":
                result |= {f"share_{T}": round(shares[2], 4)}
                result |= {} if eager_s is None else {f"speedup_{T}": round(eager_s / both_s, 1)}
        command = [sys.executable, __file__, "--memory-of", str(T), "--threads", str(args.threads)]
        result[f"bytes_{T}"] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"{T:6} full    | forward and backward add {result[f'bytes_{T}'] / 2**20:.0f} MiB")
    for S in args.lengths:
        print(f"{S:6} cached  | one query {speed_of_one_query(S, args.threads):.1f} GB/s")
    if args.json:
        print(json.dumps(result))


def visible_pairs(T: int, window: int | None) -> int:
    return sum(min(t + 1, window or T) for t in range(T))


def operands(T: int, S: int, H: int = H, K: int = K) -> tuple[Tensor, ...]:
    """q, k, v and sinks, laid out as transformers does: `[B, length, heads, D]`, transposed."""
    q, k, v = (torch.randn(1, n, heads, D).bfloat16().transpose(1, 2) for n, heads in ((T, H), (S, K), (S, K)))
    return q, k, v, torch.randn(H).bfloat16()


def time_of_ours(T: int, window: int | None, isa: str, args: argparse.Namespace) -> tuple[float, float, float]:
    """Median seconds of forward and backward, and the median peak measured between them in GFLOP/s."""
    given, d_out = operands(T, T), torch.randn(1, H, T, D).bfloat16()
    settings = {"scaling": SCALING, "window": window, "documents_BS": None}
    out, lse = cpu_attention.sink_attention_forward(*given, **settings)
    times: list[tuple[float, ...]] = []
    for _ in range(args.rounds):
        peak = peak_gflops(isa, args.threads)
        forward = measure(lambda: cpu_attention.sink_attention_forward(*given, **settings), args.threads)
        backward = measure(
            lambda: cpu_attention.sink_attention_backward(d_out, *given, out, lse, **settings), args.threads
        )
        times.append((forward, backward, peak))
    forward, backward, peak = (statistics.median(column) for column in zip(*times, strict=True))
    return forward, backward, peak


def measure(run: Callable[[], object], threads: int) -> float:
    """Seconds of processor time over threads."""
    start = time.process_time()
    run()
    return (time.process_time() - start) / threads


def time_of_eager(T: int, threads: int) -> float:
    """Seconds of forward and backward for the heads of one key/value head."""
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    *qkv, sinks = (tensor.requires_grad_() for tensor in operands(T, T, H // K, 1))
    module = SimpleNamespace(num_key_value_groups=H // K, sinks=sinks, training=True)
    mask = torch.full((T, T), torch.finfo(torch.bfloat16).min, dtype=torch.bfloat16).triu(1)[None, None]
    d_out = torch.randn(1, T, H // K, D).bfloat16()

    def run() -> object:
        out, _ = eager_attention_forward(module, *qkv, mask, SCALING)
        return torch.autograd.grad(out, (*qkv, sinks), d_out)

    return measure(run, threads)


def speed_of_one_query(S: int, threads: int) -> float:
    q, k, v, sinks = operands(1, S)
    given = q, k.contiguous(), v.contiguous(), sinks  # as a cache lays them out
    run: Callable[[], object] = lambda: cpu_attention.sink_attention_forward(  # noqa: E731
        *given, scaling=SCALING, window=None, documents_BS=None
    )
    run()
    seconds = statistics.median(measure(run, threads) for _ in range(20))
    return 1e-9 * sum(tensor.nbytes for tensor in (k, v)) / seconds


def added_bytes(T: int) -> int:
    """How much the resident memory of this process rises over its inputs' during forward and backward."""
    for length in (64, T):  # first, whatever is loaded or allocated once
        given = [tensor.requires_grad_() for tensor in operands(length, length)]
        d_out = torch.randn(1, H, length, D).bfloat16()
        with open("/proc/self/clear_refs", "w") as clear:
            clear.write("5")  # the peak starts again from here
        before = resident("VmRSS")
        out = sink_attention(*given, scaling=SCALING, window=None, documents_BS=None)
        torch.autograd.grad(out, given, d_out)
    return resident("VmHWM") - before


def resident(field: str) -> int:
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(field))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
