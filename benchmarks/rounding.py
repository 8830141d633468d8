"""What calibrated rounding keeps of an update, beside other ways to round, and how long it takes.

    python benchmarks/rounding.py [--inputs 4096] [--weights normal t4] [--kinds aligned unaligned white]
        [--experts 2] [--tokens 4096] [--json]

Error: 256 rows of 2,880 columns, on the grid by the scale rule 2^ceil(log2(amax / 6)), and an update of rank 16 whose
norm is 0.1, 1 or 5 % of theirs. E = |(W' - W - D) x| / |D x| on 2,048 inputs that no way has seen: 1 where the update
is lost, more where writing it did harm. Weights are normal or t-distributed (4 degrees of freedom). Inputs are white,
or their spectrum falls as 1/i; the update's A is random ("unaligned") or made of such inputs, as gradients are
("aligned").

    ours       rounded for `--inputs` inputs
    nearest    each number by itself, scales by the "even" rule
    dithered   each number by a threshold of its own
    ceil6      each number by itself, base + update in bf16, scales 2^ceil(log2(amax / 6)): what other tools write

Time: the experts of a layer of gpt-oss-20b, both projections. Each of 32 experts has an eighth of the tokens as inputs;
`--experts` of them are rounded, and the time of all is extrapolated from those.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from gptoss_ft.export.merged import PackedUpdate, row_workers
from gptoss_ft.export.paired import round_paired
from gptoss_ft.kernels.codec import quantize_mxfp4
from gptoss_ft.kernels.dispatch import dequantize_mxfp4
from gptoss_ft.kernels.merging import round_dithered
from gptoss_ft.model.spec import SPECS
from gptoss_ft.mxfp4.calibrated import CalibratedRounding

COLUMNS, ROWS, RANK, UNSEEN = 2880, 256, 16, 2048
SIZES = {"0.1": 0.001, "1": 0.01, "5": 0.05}
WEIGHTS, INPUTS = ("normal", "t4"), ("aligned", "unaligned", "white")
Packed = tuple[Tensor, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=4096, help="that are rounded for; 0 measures no error")
    parser.add_argument("--weights", nargs="+", default=WEIGHTS, choices=WEIGHTS)
    parser.add_argument("--kinds", nargs="+", default=INPUTS, choices=INPUTS, help="of inputs and updates")
    parser.add_argument("--experts", type=int, default=2, help="whose rounding is timed, at most 32; 0 times nothing")
    parser.add_argument("--tokens", type=int, default=4096, help="of the layer that is timed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seeds", type=int, default=1, help="random problems of each kind; the errors are means")
    parser.add_argument("--json", action="store_true", help="print one line of JSON last")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result: dict[str, float] = {}
    if args.inputs:
        print(f"E for {args.inputs} inputs, mean of {args.seeds}")
        for weights in args.weights:
            for inputs in args.kinds:
                result |= errors(weights, inputs, args.inputs, range(args.seeds))
    if args.experts:
        result |= time_layer(args.experts, args.tokens, args.threads)
    if args.json:
        print(json.dumps(result))


def errors(weights: str, inputs: str, num_inputs: int, seeds: range) -> dict[str, float]:
    """E of each way for each size of the update, by a name that says so."""
    result: dict[str, float] = {}
    for label, size in SIZES.items():
        means = dict.fromkeys(("ours", "nearest", "dithered", "ceil6"), 0.0)
        for seed in seeds:
            base, update, packed, seen, unseen = problem(weights, inputs, size, num_inputs, seed)
            target = base + update
            ways: dict[str, Callable[[], Packed]] = {
                "ours": lambda: CalibratedRounding(seen, (target, *packed)).round(target, *packed),  # noqa: B023
                "nearest": lambda: quantize_mxfp4(target),  # noqa: B023
                "dithered": lambda: round_dithered(target, *packed),  # noqa: B023
                "ceil6": lambda: ceil6(target.bfloat16().float()),  # noqa: B023
            }
            for way, to_grid in ways.items():
                error = (dequantize_mxfp4(*to_grid(), torch.float32) - target) @ unseen.T
                means[way] += float(error.norm() / (update @ unseen.T).norm()) / len(seeds)
        print(
            f"{weights:6} {inputs:9} {label:>3} % | " + " | ".join(f"{way} {E:6.3f}" for way, E in means.items()),
            flush=True,
        )
        result |= {f"{way}_{weights}_{inputs}_{label}_error_ratio": round(E, 4) for way, E in means.items()}
    return result


def problem(
    weights: str, inputs: str, size: float, num_inputs: int, seed: int
) -> tuple[Tensor, Tensor, Packed, Tensor, Tensor]:
    """Base and update [O, K], the base's blocks and scales, and the inputs to round for and to judge by."""
    generator = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=generator)
    values = normal(ROWS, COLUMNS)
    if weights == "t4":
        values /= normal(ROWS, COLUMNS, 4).square().mean(-1).sqrt()
    packed = ceil6(values * COLUMNS**-0.5 * torch.exp(0.3 * normal(ROWS, 1)))
    base = dequantize_mxfp4(*packed, torch.float32)

    mixing = input_mixing(generator) if inputs != "white" else torch.eye(COLUMNS)
    x = normal(num_inputs + UNSEEN, COLUMNS) @ mixing.T
    A = normal(RANK, COLUMNS)
    update = normal(ROWS, RANK) @ (A @ mixing.T if inputs == "aligned" else A)
    update *= size * base.norm() / update.norm()
    return base, update, packed, x[:num_inputs], x[num_inputs:]


def input_mixing(generator: torch.Generator) -> Tensor:
    """White inputs times its transpose have a spectrum of 1/i, in random directions."""
    spectrum = 1 / torch.arange(1, COLUMNS + 1)
    return torch.linalg.qr(torch.randn(COLUMNS, COLUMNS, generator=generator))[0] * (spectrum / spectrum.mean()).sqrt()


def ceil6(values: Tensor) -> Packed:
    """To nearest, with the scales 2^ceil(log2(amax / 6))."""
    mantissa, exponent = torch.frexp(values.unflatten(-1, (-1, 32)).abs().amax(-1) / 6)
    scales = (exponent - (mantissa == 0.5).int() + 127).clamp(0, 254).to(torch.uint8)
    return quantize_mxfp4(values, scales)


def time_layer(num_experts: int, num_tokens: int, threads: int) -> dict[str, float]:
    """Seconds for all experts of a layer of gpt-oss-20b, from those of some."""
    spec = SPECS["gpt_oss_20b"]
    num_inputs = num_tokens * spec.num_experts_per_tok // spec.num_local_experts
    generator = torch.Generator().manual_seed(0)
    mixing = input_mixing(generator)
    seconds = dict.fromkeys(spec.expert_shapes(), 0.0)
    for projection, (O, K) in spec.expert_shapes().items():
        for _ in range(num_experts):
            blocks, scales = quantize_mxfp4(torch.randn(O, K, generator=generator) * K**-0.5)
            inputs_NK = (torch.randn(num_inputs, K, generator=generator) @ mixing.T).bfloat16()
            A, B = torch.randn(RANK, K, generator=generator) @ mixing.T, torch.randn(O, RANK, generator=generator)
            B *= 0.01 / math.sqrt(RANK * K)  # the base's rows have norms near 1: an update of 1 %
            bias = torch.zeros(O, dtype=torch.bfloat16)
            update = PackedUpdate(blocks, scales, bias, lambda rows, A=A, B=B: B[rows] @ A)
            started = time.perf_counter()
            with row_workers() as pool:
                stats = round_paired(inputs_NK, inputs_NK, update, pool, threads).stats
            seconds[projection] += time.perf_counter() - started
            print(
                f"{projection} {O} x {K} for {num_inputs} inputs: {time.perf_counter() - started:.1f} s, "
                f"update {stats.relative_update:.2%}, E {stats.output_error:.3f} told",
                flush=True,
            )
    total = sum(seconds.values()) * spec.num_local_experts / num_experts
    how = "measured" if num_experts == spec.num_local_experts else f"extrapolated from {num_experts} experts"
    print(f"a layer of {spec.num_local_experts} experts, {threads} threads: {total:.0f} s, {how}")
    return {
        "experts_timed": num_experts,
        **{f"{projection}_expert_s": round(spent / num_experts, 2) for projection, spent in seconds.items()},
        "layer_s": round(total, 1),
    }


if __name__ == "__main__":
    main()
