"""GFLOP/s of products with packed experts, as a share of what bf16 arithmetic in registers reaches.

    python benchmarks/gemm.py [--rows 1 8 16 64 256] [--json]

8 experts of gpt-oss-20b (gate_up [5760, 2880] and down [2880, 2880], taken together), bf16 activations. Three ways take
turns in every round, so that what else the machine does meets them alike:

    ours                the library, packed weights
    torch               torch bf16 (oneDNN), weights dequantized beforehand
    dequantize + torch  the library's decode, one expert at a time, then torch

Speed is counted by processor time over threads, which another job's use of the cores hardly changes, and by the clock.
"""

import argparse
import json
import os
import statistics
import threading
import time
from collections.abc import Callable

# Waiting threads must sleep: spinning would count as processor time. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor

from gptoss_ft.kernels import cpu_gemm, cpu_library
from gptoss_ft.kernels.reference import MXFP4Weight

EXPERTS, HIDDEN = 8, 2880
SHAPES = ((2 * HIDDEN, HIDDEN), (HIDDEN, HIDDEN))  # [O, I] of gate_up and down
PEAK_ITERATIONS = 4_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16, 64, 256], help="rows per expert")
    parser.add_argument("--rounds", type=int, default=5)
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
    for rows in args.rows:
        for direction, ways in products(rows, weights, dense).items():
            times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
            for way in ways.values():
                way()
            round_peaks = []
            for _ in range(args.rounds):
                round_peaks.append(peak_gflops(isa, args.threads))
                for name, way in ways.items():
                    times[name].append(measure(way, args.threads))
            peak = statistics.median(round_peaks)
            peaks.append(peak)
            gflop = sum(2e-9 * EXPERTS * rows * O * I for O, I in SHAPES)
            cells = []
            for name, measured in times.items():
                cpu, wall = (gflop / statistics.median(column) for column in zip(*measured, strict=True))
                share = cpu / peak if peak else float("nan")
                cells.append(f"{name} {cpu:6.0f} ({share:4.0%}) · {wall:5.0f}")
                if name == "ours":
                    result[f"share_{direction}_{rows}"] = round(share, 4)
            print(f"{rows:4} rows {direction:3} | " + " | ".join(cells), flush=True)
    result["peak_gflops"] = round(statistics.median(peaks), 1)
    print(f"peak {result['peak_gflops']} GFLOP/s")
    if args.json:
        print(json.dumps(result))


def random_weight(O: int, I: int) -> MXFP4Weight:
    blocks = torch.randint(0, 256, (EXPERTS, O, I // 32, 16), dtype=torch.uint8)
    return MXFP4Weight(blocks, torch.randint(115, 123, (EXPERTS, O, I // 32), dtype=torch.uint8))


def products(rows: int, weights: list[MXFP4Weight], dense: list[Tensor]) -> dict[str, dict[str, Callable[[], object]]]:
    """The ways to compute `fwd` and `dx` of both projections."""
    ends = [rows * (e + 1) for e in range(EXPERTS)]
    xs = [torch.randn(EXPERTS * rows, I).bfloat16() for _, I in SHAPES]
    dys = [torch.randn(EXPERTS * rows, O).bfloat16() for O, _ in SHAPES]

    def of_torch(inputs: list[Tensor], expert_weight: Callable[[int, int], Tensor]) -> None:
        for i, all_rows in enumerate(inputs):
            for e, expert_rows in enumerate(all_rows.split(rows)):
                expert_rows @ expert_weight(i, e)

    def decode(i: int, e: int) -> Tensor:
        return cpu_library.decode(weights[i].blocks_EOGB[e], weights[i].scales_EOG[e], torch.bfloat16)

    return {
        "fwd": {
            "ours": lambda: [cpu_gemm.grouped_linear(x, w, None, ends) for x, w in zip(xs, weights, strict=True)],
            "torch": lambda: of_torch(xs, lambda i, e: dense[i][e].T),
            "dequantize + torch": lambda: of_torch(xs, lambda i, e: decode(i, e).T),
        },
        "dx": {
            "ours": lambda: [cpu_gemm.grouped_linear_dx(dy, w, ends) for dy, w in zip(dys, weights, strict=True)],
            "torch": lambda: of_torch(dys, lambda i, e: dense[i][e]),
            "dequantize + torch": lambda: of_torch(dys, decode),
        },
    }


def measure(run: Callable[[], object], threads: int) -> tuple[float, float]:
    """Seconds of processor time over threads, and seconds of the clock."""
    cpu, wall = time.process_time(), time.perf_counter()
    run()
    return (time.process_time() - cpu) / threads, time.perf_counter() - wall


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
