"""Compile the Triton kernels for GPUs that are not there, and say what their code is made of.

    python -m gptoss_ft.kernels.gpu.ahead_of_time

prints registers, spills, shared memory and tensor-core instructions of every kernel with the tiles it runs with, at the
sizes of gpt-oss. That is no timing; it shows tiles that spill and products that miss the tensor cores.
"""

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.backends.nvidia
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gptoss_ft.kernels.gpu import (
    low_rank,
    low_rank_kernels,
    merge_kernels,
    merging,
    mxfp4_kernels,
    packed_experts,
    row_kernels,
    rows,
)

# A100 · L4 and RTX 40 · H100 and H200 · B200
CAPABILITIES = (80, 89, 90, 100)
TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"
# (O, I) of gpt-oss's gate_up and down projections.
GPT_OSS = ((5760, 2880), (2880, 2880))

ARGUMENT_TYPES = {
    **dict.fromkeys(("blocks", "scales", "out_blocks", "out_scales"), "*u8"),
    **dict.fromkeys(("tiles_N3", "ranges_E2", "experts_N"), "*i32"),
    **dict.fromkeys(("A", "B", "h"), "*fp32"),
    **dict.fromkeys(("num_blocks", "num_columns", "num_rows", "steps_of_part", "num_parts", "E", "R"), "i32"),
    # Of factors whose columns are contiguous, as those of gpt-oss they are multiples of 16.
    **dict.fromkeys(("stride_S", "stride_E", "stride_R"), "i32:16"),
    **dict.fromkeys(("scaling", "alpha", "limit"), "fp32"),
    "slots": "*i64",
}
FUSED_MULTIPLY_ADD = re.compile(r"\bFFMA")
TENSOR_CORES = re.compile(r"\b((?:HMMA|HGMMA|UTC\w*MMA)[.\w]*)")
LOCAL_MEMORY = re.compile(r"\b(?:STL|LDL)\b")


class Build(NamedTuple):
    """A kernel and the constants it is compiled with."""

    kernel: Any
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    fuses: bool = True  # products and sums to one operation of one rounding
    fp32: tuple[str, ...] = ()  # arguments in fp32 that are bf16 otherwise

    @property
    def name(self) -> str:
        names = self.kernel.arg_names
        tile = "×".join(str(self.constants[name]) for name in names if name.endswith("_"))
        dithered = "_dithered" if self.constants.get("DITHERED") else ""
        fp32 = ", ".join(name for name in names if name in self.fp32)
        return f"{self.kernel.__name__.removesuffix('_kernel')}{dithered} {tile}{fp32 and f', {fp32} in fp32'}"

    @property
    def on_tensor_cores(self) -> bool:
        """Whether it multiplies what tensor cores can."""
        return self.constants.get("OPERAND") == tl.bfloat16


class Code(NamedTuple):
    """What one build is for one GPU. `spills` counts instructions that move registers to memory or back."""

    registers: int
    spills: int
    shared_bytes: int
    tensor_cores: tuple[str, ...]
    flushes_subnormals: bool
    fuses: bool


def builds(O: int, I: int) -> Iterator[Build]:
    """Every kernel with every tile that it is launched with, for one projection."""
    shape = {"O": O, "I": I, "OPERAND": tl.bfloat16}
    for tile in packed_experts.FORWARD_TILES:
        *sizes, warps, stages = tile
        constants = shape | {"HAS_BIAS": True} | dict(zip(("T_", "O_", "I_"), sizes, strict=True))
        yield Build(mxfp4_kernels.grouped_linear_kernel, constants, warps, stages)
    for tile in packed_experts.BACKWARD_TILES:
        *sizes, warps, stages = tile
        constants = shape | dict(zip(("T_", "O_", "I_"), sizes, strict=True))
        yield Build(mxfp4_kernels.grouped_linear_dx_kernel, constants, warps, stages)
    yield Build(mxfp4_kernels.dequantize_kernel, {"N_": packed_experts.DECODE_TILE})
    bias = {"O": O, "T_": packed_experts.BIAS_TILE_T, "O_": packed_experts.BIAS_TILE_O}
    yield Build(mxfp4_kernels.add_bias_kernel, bias)
    for dithered in (False, True):
        packed = {"O": O, "G": I // 32, "DITHERED": dithered, "O_": merging.PACKED_ROWS}
        yield Build(merge_kernels.merge_mxfp4_kernel, packed, fuses=False)
    dense = {"O": O, "I": I, "O_": merging.DENSE_ROWS, "I_": merging.DENSE_COLUMNS}
    yield Build(merge_kernels.merge_bf16_kernel, dense, fuses=False)
    yield Build(row_kernels.clamped_swiglu_kernel, {"N_": rows.TILE})
    fp32 = ("weights", "d_weights")
    yield Build(row_kernels.weighted_swiglu_backward_kernel, {"I": I, "I_": rows.TILE}, fp32=fp32)
    yield Build(row_kernels.combine_kernel, {"K": 4, "I": I, "HAS_WEIGHTS": True, "I_": rows.TILE})
    # The smallest and the largest tile of ranks. PEFT keeps factors in fp32 beside bf16 rows, unless told otherwise.
    yield from _low_rank_builds(I, low_rank.LEAST_RANKS, torch.bfloat16, ())
    yield from _low_rank_builds(I, low_rank.MOST_RANKS, torch.bfloat16, ("factor", "d_factor"))
    yield from _low_rank_builds(I, low_rank.MOST_RANKS, torch.float32, ("x", "y", "factor", "d_factor"))


def _low_rank_builds(I: int, R: int, rows: torch.dtype, fp32: tuple[str, ...]) -> Iterator[Build]:
    shape = {"R": R, "I": I, "R_": low_rank.ranks_of_a_tile(R, rows), "stride_I": 1}
    shape["OPERAND"] = tl.bfloat16 if rows == torch.bfloat16 else tl.float32
    for kernel, tiles in (
        (low_rank_kernels.low_rank_down_kernel, low_rank.DOWN_TILES),
        (low_rank_kernels.low_rank_up_kernel, low_rank.UP_TILES),
        (low_rank_kernels.low_rank_gradient_kernel, (low_rank.GRADIENT_TILE,)),
    ):
        for T_, I_, warps, stages in tiles if rows == torch.bfloat16 else (low_rank.FP32_TILE,):
            yield Build(kernel, shape | {"T_": T_, "I_": I_}, warps, stages, fp32=fp32)


def compile_for(capability: int, build: Build) -> Code:
    """Compile one build, its tensors aligned as torch allocates them, and read its machine code."""
    names = build.kernel.arg_names
    types = ARGUMENT_TYPES | dict.fromkeys(build.fp32, "*fp32") | dict.fromkeys(build.constants, "constexpr")
    signature = {name: types.get(name, "*bf16") for name in names}
    aligned = [n for n, name in enumerate(names) if signature[name][0] == "*" or signature[name].endswith(":16")]
    source = ASTSource(
        fn=build.kernel,
        signature={name: type.removesuffix(":16") for name, type in signature.items()},
        constexprs=build.constants,
        attrs={(n,): [["tt.divisibility", 16]] for n in aligned},
    )
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages, "enable_fp_fusion": build.fuses}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _output(TOOLS / "cuobjdump", "--dump-resource-usage", cubin.name)
        machine_code = _output(TOOLS / "nvdisasm", "-c", cubin.name)
    registers = re.search(r"REG:(\d+)", usage)
    if registers is None:
        raise RuntimeError(f"cuobjdump told no registers: {usage}")
    return Code(
        registers=int(registers[1]),
        spills=len(LOCAL_MEMORY.findall(machine_code)),
        shared_bytes=compiled.metadata.shared,
        tensor_cores=tuple(sorted(set(TENSOR_CORES.findall(machine_code)))),
        flushes_subnormals=".ftz" in compiled.asm["ptx"],
        fuses=bool(FUSED_MULTIPLY_ADD.search(machine_code)),
    )


def _output(*command: object) -> str:
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("capabilities", nargs="*", type=int, default=CAPABILITIES, help="for example 80 90")
    capabilities = parser.parse_args().capabilities
    print("| O × I | kernel and tile | GPU | registers | spills | shared KiB | tensor cores |\n" + "|---" * 7 + "|")
    for O, I in GPT_OSS:
        for build in builds(O, I):
            for capability in capabilities:
                code = compile_for(capability, build)
                cores = ", ".join(code.tensor_cores) or "-"
                numbers = f"{code.registers} | {code.spills} | {code.shared_bytes / 1024:.0f}"
                print(f"| {O} × {I} | {build.name} | sm_{capability} | {numbers} | {cores} |", flush=True)


if __name__ == "__main__":
    main()
