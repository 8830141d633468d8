"""One expert layer of gpt-oss-20b, forward and backward with LoRA on both projections, beside transformers with PEFT.

    python benchmarks/moe_layer.py [--tokens 512 2048] [--limit 600] [--json]

32 experts, top 4 of a random router, bf16 activations and adapters, r = 16, gradients of hidden states, routing weights
and adapters. Each side runs in a process of its own:

    ours    this package, weights packed as MXFP4, freed memory kept between rounds as `gptoss-ft train` keeps it
    peer    transformers' experts with the implementation `grouped_mm`, bf16 weights, PEFT's `target_parameters`, memory
            as torch leaves it

Time is processor time over threads, which another job's use of the cores hardly changes; the median of three rounds
after one that warms up, or of fewer if they take minutes. Memory is the high-water mark of the resident set above what
it is once weights are loaded. A side whose first round takes longer than the limit is stopped, and what it had used by
then stands as a lower bound, shown as ">".

`share_*` is the useful arithmetic of ours over what registers alone could do in its time: forward and input gradients
of both frozen products, and three products for each LoRA matrix.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

# Waiting threads must sleep: spinning would count as processor time. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import psutil
import torch
from gemm import peak_gflops
from torch import Tensor, nn
from transformers import GptOssConfig

from gptoss_ft.kernels import cpu_library
from gptoss_ft.training.memory import keeping_freed_memory

EXPERTS, CHOICES, HIDDEN, RANK, ALPHA = 32, 4, 2880, 16, 32
ROUNDS = 3
MIB = 2**20


class Cost(NamedTuple):
    seconds: float
    mib: float
    peak_gflops: float = 0.0
    stopped: bool = False

    def __str__(self) -> str:
        at_least = ">" if self.stopped else ""
        return f"{at_least}{self.seconds:.2f} s, {at_least}{self.mib:.0f} MiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--limit", type=float, default=600, help="seconds of one side at one size")
    parser.add_argument("--json", action="store_true", help="print one line of JSON last")
    parser.add_argument("--side", choices=SIDES, help="measure this side only, in this process")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.side:
        measure(args.side, args.tokens[0], args.threads, args.limit)
        return

    result: dict[str, float] = {}
    bounds = []
    for tokens in args.tokens:
        ours, peer = (in_process(side, tokens, args.threads, args.limit) for side in SIDES)
        speedup, ratio = peer.seconds / ours.seconds, ours.mib / peer.mib
        least, most = ("at least ", "at most ") if peer.stopped else ("", "")
        print(f"{tokens} tokens, {args.threads} threads: ours {ours} | peer {peer}", end=" | ")
        print(f"{least}{speedup:.1f} times as fast, with {most}{ratio:.3f} of the memory", end="")
        result |= {f"speedup_{tokens}": round(speedup, 2), f"memory_ratio_{tokens}": round(ratio, 3)}
        if ours.peak_gflops and not ours.stopped:
            share = result[f"share_{tokens}"] = round(layer_gflop(tokens) / ours.seconds / ours.peak_gflops, 4)
            print(f" | ours at {share:.1%} of {ours.peak_gflops:.0f} GFLOP/s", end="")
        print(flush=True)
        bounds += [f"{name}_{tokens}" for name in ("speedup", "memory_ratio") if peer.stopped]
    if args.json:
        print(json.dumps(result | {"bounds": bounds}))


def in_process(side: str, tokens: int, threads: int, limit: float) -> Cost:
    """Run this file with `--side` and read what it prints: a line when it is loaded, and one with its cost."""
    command = [sys.executable, __file__, "--side", side, "--tokens", str(tokens), "--threads", str(threads)]
    command += ["--limit", str(limit)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        try:
            base_mib, base_seconds = json.loads(child.stdout.readline())
            process = psutil.Process(child.pid)
            while child.poll() is None:
                used = process.cpu_times()
                seconds = (used.user + used.system - base_seconds) / threads
                # After its first round the child stops by itself in time.
                if seconds > limit:
                    return Cost(seconds, status_mib(child.pid, "VmHWM") - base_mib, stopped=True)
                time.sleep(1)
            return Cost(*json.loads(child.stdout.readline()))
        finally:
            child.kill()


def measure(side: str, tokens: int, threads: int, limit: float) -> None:
    torch.manual_seed(0)
    step, leaves = SIDES[side](tokens)
    # Writing 5 sets the high-water mark back to what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    base = status_mib(os.getpid(), "VmRSS")
    print(json.dumps((base, time.process_time())), flush=True)
    times: list[float] = []
    peaks: list[float] = []
    with keeping_freed_memory() if side == "ours" else nullcontext():
        # No further round unless it will end well within the limit.
        while len(times) < 1 + ROUNDS and sum(times) + max(times, default=0) < limit / 2:
            for leaf in leaves:
                leaf.grad = None
            peaks.append(peak_gflops(cpu_library.selected_isa(), threads) if cpu_library.library() else 0.0)
            start = time.process_time()
            step()
            times.append((time.process_time() - start) / threads)
            if not all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves):
                raise RuntimeError("a gradient is missing or not finite")
        most = status_mib(os.getpid(), "VmHWM")
    print(json.dumps((statistics.median(times[1:] or times), most - base, statistics.median(peaks))), flush=True)


def layer_gflop(tokens: int) -> float:
    """The useful arithmetic of a forward and a backward pass."""
    shapes = ((2 * HIDDEN, HIDDEN), (HIDDEN, HIDDEN))
    return sum(2e-9 * tokens * CHOICES * (2 * O * I + 3 * RANK * (O + I)) for O, I in shapes)


def ours(tokens: int) -> tuple[Callable[[], None], list[Tensor]]:
    from peft import LoraConfig

    from gptoss_ft.adapters.experts import wrap_experts
    from gptoss_ft.model.experts import PackedExperts

    experts = PackedExperts(config()).bfloat16()
    for name, parameter in experts.named_parameters():
        if name.endswith("_blocks"):
            parameter.copy_(torch.randint(0, 256, parameter.shape, dtype=torch.uint8))
        elif name.endswith("_scales"):
            parameter.copy_(torch.randint(115, 123, parameter.shape, dtype=torch.uint8))
        else:
            parameter.data.normal_()
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA)
    layer = wrap_experts(experts, "default", lora, projections=("gate_up_proj", "down_proj"), experts=None)
    return step_of(layer, layer, tokens)


def peer(tokens: int) -> tuple[Callable[[], None], list[Tensor]]:
    from peft import LoraConfig, get_peft_model
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = GptOssExperts(config())

    torch.set_default_dtype(torch.bfloat16)
    layer = Layer()
    torch.set_default_dtype(torch.float32)
    for parameter in layer.parameters():
        for expert in parameter.data:  # one at a time: a draw of all would be most of what is resident
            expert.copy_(0.02 * torch.randn(expert.shape))
    lora = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=[],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    model = get_peft_model(layer, lora, autocast_adapter_dtype=False)
    return step_of(model, model.base_model.model.experts, tokens)


def step_of(model: nn.Module, experts: nn.Module, tokens: int) -> tuple[Callable[[], None], list[Tensor]]:
    """One forward and backward pass of `experts`, and all that it gives gradients."""
    hidden = torch.randn(tokens, HIDDEN).bfloat16().requires_grad_()
    scores, chosen = torch.randn(tokens, EXPERTS).topk(CHOICES, dim=-1)
    routing = scores.softmax(-1).bfloat16().requires_grad_()
    d_out = torch.randn(tokens, HIDDEN).bfloat16()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data.normal_(std=0.02)  # B starts at zero, and gradients of A with it
    if {parameter.dtype for parameter in trained} != {torch.bfloat16} or len(trained) != 4:
        raise RuntimeError("LoRA must be A and B of both projections, in bf16")

    def step() -> None:
        experts(hidden, chosen, routing).backward(d_out)

    return step, [hidden, routing, *trained]


def config() -> GptOssConfig:
    return GptOssConfig(
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        num_local_experts=EXPERTS,
        num_experts_per_tok=CHOICES,
        experts_implementation="grouped_mm",
    )


def status_mib(pid: int, name: str) -> float:
    """A line of /proc/PID/status, which counts in KiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024 / MIB


SIDES = {"ours": ours, "peer": peer}

if __name__ == "__main__":
    main()
