"""GFLOP/s of products with packed experts, as a share of what bf16 (or, without AVX-512-BF16, fp32) arithmetic in
registers reaches.

    python benchmarks/gemm.py [--rows 1 8 16 64 256] [--json]

8 experts of gpt-oss-20b (gate_up [5760, 2880] and down [2880, 2880], taken together), bf16 activations. Four ways take
turns in every round, so that what else the machine does meets them alike:

    ours                the library, packed weights
    dense               the library, the same weights dequantized to bf16 beforehand
    torch               torch bf16 (oneDNN), weights dequantized beforehand
    dequantize + torch  the library's decode, one expert at a time, then torch

A way whose rounds would take longer than the budget is measured once, on one expert, and marked with ~; one that would
need longer even for that is left out. Without AVX-512, torch has multiplied bf16 at 0.2 GFLOP/s in one direction.

Speed is counted by processor time over threads, which another job's use of the cores hardly changes, and by the clock.
"""

import argparse
import json
import math
import os
import statistics
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

# Waiting threads must sleep: spinning would count as processor time. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor

from gptoss_ft.kernels import cpu_gemm, cpu_library
from gptoss_ft.kernels.reference import MXFP4Weight

EXPERTS, HIDDEN = 8, 2880
SHAPES = ((2 * HIDDEN, HIDDEN), (HIDDEN, HIDDEN))  # [O, I] of gate_up and down
PEAK_ITERATIONS = 4_000_000
KEYS = {"ours": "share", "dense": "dense_share"}


Way = Callable[[int], object]  # computes both projections of so many experts


class Measured(NamedTuple):
    gflop: float
    cpu_s: float  # processor time over threads
    wall_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16, 64, 256], help="rows per expert")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=12.0, help="seconds for all rounds of one way")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="print one line of JSON last")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    weights = [random_weight(*shape) for shape in SHAPES]
    dense = [cpu_library.decode(*weight, torch.bfloat16) for weight in weights]
    isa = cpu_library.selected_isa()
    print(f"{isa}, {args.threads} threads, {EXPERTS} experts; GFLOP/s by processor time (share of peak) · by the clock")
    result: dict[str, float] = {}
    peaks: list[float] = []
    speeds: dict[tuple[str, str], float] = {}  # of (way, direction) at the last number of rows, GFLOP/s
    for rows in args.rows:
        for direction, ways in products(rows, weights, dense).items():
            tried = [n for n in ways if gflop(rows, 1) <= args.budget * speeds.get((n, direction), math.inf)]
            # The first call warms up, and tells what a round will take.
            times = {name: [measure(ways[name], rows, 1, args.threads)] for name in tried}
            speeds |= {(name, direction): first.gflop / first.cpu_s for name, (first,) in times.items()}
            affordable = [n for n, (first,) in times.items() if first.cpu_s * EXPERTS * args.rounds <= args.budget]
            times |= {name: [] for name in affordable}
            round_peaks = []
            for _ in range(args.rounds):
                round_peaks.append(peak_gflops(isa, args.threads))
                for name in affordable:
                    times[name].append(measure(ways[name], rows, EXPERTS, args.threads))
            peak = statistics.median(round_peaks)
            peaks.append(peak)
            cells = []
            for name, measured in times.items():
                cpu = statistics.median(m.gflop / m.cpu_s for m in measured)
                wall = statistics.median(m.gflop / m.wall_s for m in measured)
                share = cpu / peak if peak else float("nan")
                cells.append(f"{'' if name in affordable else '~'}{name} {cpu:6.1f} ({share:4.0%}) · {wall:5.1f}")
                if name in KEYS:
                    result[f"{KEYS[name]}_{direction}_{rows}"] = round(share, 4)
            print(f"{rows:4} rows {direction:3} | " + " | ".join(cells), flush=True)
    result["peak_gflops"] = round(statistics.median(peaks), 1)
    print(f"peak {result['peak_gflops']} GFLOP/s")
    if args.json:
        print(json.dumps(result))


def random_weight(O: int, I: int) -> MXFP4Weight:
    blocks = torch.randint(0, 256, (EXPERTS, O, I // 32, 16), dtype=torch.uint8)
    return MXFP4Weight(blocks, torch.randint(115, 123, (EXPERTS, O, I // 32), dtype=torch.uint8))


def products(rows: int, weights: list[MXFP4Weight], dense: list[Tensor]) -> dict[str, dict[str, Way]]:
    """The ways to compute `fwd` and `dx`."""
    xs = [torch.randn(EXPERTS * rows, I).bfloat16() for _, I in SHAPES]
    dys = [torch.randn(EXPERTS * rows, O).bfloat16() for O, _ in SHAPES]

    def of_library(product: Callable[..., Tensor], inputs: list[Tensor], stacks: list[Any], experts: int) -> None:
        ends = [rows * (e + 1) for e in range(experts)]
        for x, stack in zip(inputs, stacks, strict=True):
            some = MXFP4Weight(*(t[:experts] for t in stack)) if isinstance(stack, MXFP4Weight) else stack[:experts]
            product(x[: rows * experts], some, ends_E=ends)

    def of_torch(inputs: list[Tensor], expert_weight: Callable[[int, int], Tensor], experts: int) -> None:
        for i, all_rows in enumerate(inputs):
            for e, expert_rows in enumerate(all_rows.split(rows)[:experts]):
                expert_rows @ expert_weight(i, e)

    def decode(i: int, e: int) -> Tensor:
        return cpu_library.decode(weights[i].blocks_EOGB[e], weights[i].scales_EOG[e], torch.bfloat16)

    return {
        "fwd": {
            "ours": partial(of_library, partial(cpu_gemm.grouped_linear, bias_EO=None), xs, weights),
            "dense": partial(of_library, partial(cpu_gemm.grouped_dense, bias_EO=None), xs, dense),
            "torch": partial(of_torch, xs, lambda i, e: dense[i][e].T),
            "dequantize + torch": partial(of_torch, xs, lambda i, e: decode(i, e).T),
        },
        "dx": {
            "ours": partial(of_library, cpu_gemm.grouped_linear_dx, dys, weights),
            "dense": partial(of_library, cpu_gemm.grouped_dense_dx, dys, dense),
            "torch": partial(of_torch, dys, lambda i, e: dense[i][e]),
            "dequantize + torch": partial(of_torch, dys, decode),
        },
    }


def measure(way: Way, rows: int, experts: int, threads: int) -> Measured:
    cpu, wall = time.process_time(), time.perf_counter()
    way(experts)
    cpu_s, wall_s = (time.process_time() - cpu) / threads, time.perf_counter() - wall
    return Measured(gflop(rows, experts), cpu_s, wall_s)


def gflop(rows: int, experts: int) -> float:
    return sum(2e-9 * experts * rows * O * I for O, I in SHAPES)


def peak_gflops(isa: str, threads: int) -> float:
    """Register-only arithmetic on all threads at once, by processor time; 0 where the library has no such loop."""
    operations: list[int] = []
    workers = [
        threading.Thread(target=lambda: operations.append(cpu_library.register_peak(isa, PEAK_ITERATIONS)))
        for _ in range(threads)
    ]
    cpu = time.process_time()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return 1e-9 * sum(operations) / ((time.process_time() - cpu) / threads)


if __name__ == "__main__":
    main()
