"""The Triton kernels without a GPU: their results in the interpreter, their machine code, and when they are refused."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gptoss_ft.kernels import dispatch, flex_attention
from gptoss_ft.kernels.cases import Draw
from gptoss_ft.kernels.gpu import dense_experts, launch, low_rank, packed_experts
from gptoss_ft.kernels.gpu import device as gpu_device
from gptoss_ft.kernels.gpu import merging as gpu_merging
from gptoss_ft.kernels.gpu import rows as gpu_rows

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed: it has no wheel for this platform", allow_module_level=True)

from gptoss_ft.kernels.gpu import ahead_of_time

CUDA = torch.device("cuda", 0)


INTERPRETED = (
    "triton_interpreted",
    "triton_interpreted_low_rank",
    "triton_interpreted_merging",
    "triton_interpreted_rows",
    "triton_interpreted_step",
)


@pytest.mark.parametrize("name", INTERPRETED)
def test_results_in_the_interpreter(name):
    # Triton reads the variable when it is imported, and other tests need it uninterpreted. The interpreter computes in
    # numpy, which warns of the infinities and NaNs that extreme scales are tested for.
    tests = Path(__file__).with_name(f"{name}.py")
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-W", "ignore::RuntimeWarning", str(tests)]
    # One of them imports from another.
    variables = {"TRITON_INTERPRET": "1", "PYTHONPATH": str(tests.parent)}
    run = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.skipif(not (ahead_of_time.TOOLS / "ptxas").is_file(), reason="this triton was built without ptxas")
@pytest.mark.parametrize(
    "capability", [80, 90, *(pytest.param(capability, marks=pytest.mark.slow) for capability in (89, 100))]
)
def test_machine_code_of_every_tile_spills_nothing_and_multiplies_on_tensor_cores(capability):
    # Both dimensions of the down projection leave a remainder of a tile.
    for build in ahead_of_time.builds(2880, 2880):
        code = ahead_of_time.compile_for(capability, build)
        assert code.spills == 0, f"{build.name}: {code}"
        assert not code.flushes_subnormals, f"{build.name} would decode small weights to 0"
        assert build.fuses or not code.fuses, f"{build.name} would have other bits than its definition"
        # 99 KiB is what RTX 30 and 40 and the L4 let a program have.
        assert code.shared_bytes <= 99 * 1024
        assert bool(code.tensor_cores) == build.on_tensor_cores, f"{build.name}: {code}"


def test_products_and_sums_are_fused_unless_they_must_not_be():
    (merge, _) = (build for build in ahead_of_time.builds(2880, 2880) if "merge_mxfp4" in build.name)
    assert ahead_of_time.compile_for(80, merge._replace(fuses=True)).fuses


def test_a_tile_that_is_too_large_shows():
    large = next(iter(ahead_of_time.builds(2880, 2880)))
    large = large._replace(constants=large.constants | {"T_": 128, "O_": 256}, num_warps=4)
    assert ahead_of_time.compile_for(80, large).spills > 100


@pytest.fixture
def nvidia(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A machine with an A100, as torch tells it."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    monkeypatch.setenv("CC", "gcc")
    forget_device()
    yield monkeypatch
    forget_device()


def forget_device() -> None:
    gpu_device._lacks.cache_clear()
    gpu_device._lacks_compiler.cache_clear()


@pytest.mark.usefixtures("nvidia")
def test_ampere_with_triton_is_accepted():
    assert packed_experts.unavailable(CUDA, torch.bfloat16) == ""
    assert packed_experts.unavailable(CUDA, torch.float32) == "the GPU kernels compute in bfloat16, not float32"
    assert (
        flex_attention.unavailable(CUDA, torch.float32) == packed_experts.dequantize_unavailable(CUDA, torch.half) == ""
    )
    assert "not float64" in packed_experts.dequantize_unavailable(CUDA, torch.float64)


@pytest.mark.parametrize(
    "unavailable",
    [
        packed_experts.unavailable,
        packed_experts.dequantize_unavailable,
        flex_attention.unavailable,
        gpu_merging.unavailable,
        low_rank.unavailable,
        gpu_rows.unavailable,
    ],
    ids=["products", "decode", "attention", "merges", "lora", "rows"],
)
def test_other_machines_are_refused_in_words(unavailable, nvidia):
    def reason(device: torch.device = CUDA) -> str:
        forget_device()
        return unavailable(device, torch.bfloat16)

    assert "NVIDIA GPUs, not xpu" in reason(torch.device("xpu"))
    nvidia.delenv("CC")
    nvidia.setattr("shutil.which", lambda _: None)
    assert "C compiler: install gcc" in reason()
    nvidia.setattr(importlib.util, "find_spec", lambda _: None)
    assert "triton is not installed" in reason()
    nvidia.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    nvidia.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert reason() == "Tesla T4 has compute capability 7.5; the GPU kernels need 8.0"
    nvidia.setattr(torch.cuda, "is_available", lambda: False)
    assert "no NVIDIA GPU" in reason()
    nvidia.setattr(torch.version, "hip", "7.0")
    assert "AMD" in reason()


def test_torchs_own_products_need_no_compiler(nvidia):
    nvidia.delenv("CC")
    nvidia.setattr("shutil.which", lambda _: None)
    assert dense_experts.unavailable(CUDA, torch.bfloat16) == ""
    assert "not xpu" in dense_experts.unavailable(torch.device("xpu"), torch.bfloat16)


def test_a_device_is_asked_once(nvidia):
    nvidia.delenv("CC")
    looked_for = []
    nvidia.setattr("shutil.which", lambda name: looked_for.append(name) or name)
    for _ in range(3):
        assert packed_experts.unavailable(CUDA, torch.bfloat16) == flex_attention.unavailable(CUDA, torch.float32) == ""
    assert looked_for == ["clang"]


@pytest.mark.parametrize(
    ("operation", "tiles"),
    [
        (dispatch.grouped_linear, packed_experts.FORWARD_TILES),
        (dispatch.grouped_linear_dx, packed_experts.BACKWARD_TILES),
    ],
    ids=["forward", "backward"],
)
@pytest.mark.parametrize("set_to", ["0", "100", "1000000"])
@pytest.mark.parametrize("wrong", [None, "fused", "decoded"])
def test_self_checks_lead_through_every_tile_and_both_ways_whatever_is_set(
    operation, tiles, set_to, wrong, monkeypatch
):
    """So the verdict, which is kept, holds for a run where the variable has another value."""
    seen = []

    def on_the_cpu(rows, weight, *rest):
        ends, out = rest[-1], operation.reference(rows, weight, *rest)
        fused = not packed_experts._decodes_chunks(rows, out.shape[1], ends)
        seen.append(launch.tile_for(tiles, ends) if fused else None)
        return out * (1.03 if wrong == ("fused" if fused else "decoded") else 1)

    monkeypatch.setenv(packed_experts.FUSED_ROWS_VARIABLE, set_to)
    (triton,) = (made for made in operation.implementations if made.name == "triton")
    verdict = operation._check(replace(triton, function=on_the_cpu), torch.device("cpu"), torch.bfloat16)
    assert set(seen) == {*tiles, None}
    assert verdict.passed == (wrong is None) and packed_experts.fused_rows() == int(set_to)


def test_self_checks_of_lora_lead_through_every_tile_and_sums_in_parts(monkeypatch):
    """With factors of both dtypes; fp32 ones, as training has them, in the alignment of gpt-oss's features.

    For multiples of 16 Triton compiles other code.
    """
    seen = []

    def note(kernel, programs, *arguments, **constants):
        given = dict(zip(kernel.arg_names, arguments, strict=False))
        factor = given["factor"] if "factor" in given else given["d_factor"]
        aligned = constants["I"] % 16 == 0 and all(stride % 16 == 0 for stride in factor.stride()[:-1])
        seen.append((constants["T_"], constants["I_"], constants["R_"], factor.dtype, aligned))

    num_parts, parts = low_rank._num_parts, []
    monkeypatch.setattr(low_rank, "launch", note)
    monkeypatch.setattr(low_rank, "_num_parts", lambda *numbers: parts.append(num_parts(*numbers)) or parts[-1])
    for dtype, down, up, gradient in (
        (torch.bfloat16, low_rank.DOWN_TILES, low_rank.UP_TILES, low_rank.GRADIENT_TILE),
        (torch.float32, *((low_rank.FP32_TILE,),) * 2, low_rank.FP32_TILE),
    ):
        for operation, tiles in (
            (dispatch.low_rank_down, down),
            (dispatch.low_rank_up_, up),
            (dispatch.low_rank_gradient_, (gradient,)),
        ):
            seen.clear(), parts.clear()
            (triton,) = (made for made in operation.implementations if made.name == "triton")
            for size in triton.check_sizes:
                triton.function(*operation.case.call(Draw(torch.device("cpu"), dtype), size).args)
            for factor in ((dtype, False), (torch.float32, True)):
                found = [each for each in seen if each[3:] == factor]
                assert {each[:2] for each in found} == {tile[:2] for tile in tiles}
                assert {each[2] for each in found} == ({16, 64} if dtype == torch.bfloat16 else {16})
            assert operation is dispatch.low_rank_up_ or {each > 1 for each in parts} == {False, True}


def test_rows_per_expert_decide_between_the_two_ways(monkeypatch):
    ends, rows = [0, 300, 300, 384], torch.empty(384, 64, dtype=torch.bfloat16)
    assert packed_experts._decodes_chunks(rows, 64, ends)
    assert not packed_experts._decodes_chunks(rows[:383], 64, [0, 300, 300, 383])
    assert not packed_experts._decodes_chunks(rows, 36, ends), "grouped_mm would pad its rows of 72 bytes"
    monkeypatch.setenv(packed_experts.FUSED_ROWS_VARIABLE, "193")
    assert not packed_experts._decodes_chunks(rows, 64, ends)
    monkeypatch.setenv(packed_experts.FUSED_ROWS_VARIABLE, "many")
    with pytest.raises(ValueError, match="GPTOSS_FT_FUSED_ROWS=many: give a number"):
        packed_experts.fused_rows()


def test_tables_name_every_row_of_the_adapted_experts_once_and_are_kept():
    ends, cpu = [3, 3, 8], torch.device("cpu")
    assert launch.tile_table(ends, 2, cpu).tolist() == [[0, 2, 0], [2, 1, 0], [3, 2, 2], [5, 2, 2], [7, 1, 2]]
    assert launch.tile_table(ends, 2, cpu, {1, 2}).tolist() == [[3, 2, 2], [5, 2, 2], [7, 1, 2]]
    assert launch.tile_table(ends, 2, cpu, {1}).shape == (0, 3)
    assert launch.range_table(ends, cpu).tolist() == [[0, 3], [3, 3], [3, 8]]
    assert launch.range_table(ends, cpu, {2}).tolist() == [[0, 0], [3, 3], [3, 8]]
    assert launch.on_device(ends, cpu).tolist() == ends
    assert launch.tile_table(tuple(ends), 2, cpu, frozenset({2, 1})) is launch.tile_table(ends, 2, cpu, [1, 2])


def test_tables_are_kept_from_the_forward_to_the_backward_pass_of_every_layer(monkeypatch):
    """In gpt-oss-120b, whose weights are decoded in twelve chunks a layer."""
    num_layers, E, O, R, cpu = 36, 128, 32, 4, torch.device("cpu")
    monkeypatch.setenv(packed_experts.FUSED_ROWS_VARIABLE, "0")
    monkeypatch.setattr(packed_experts, "CHUNK_BYTES", 11 * O * 32 * 2)
    for module in (packed_experts, low_rank):
        monkeypatch.setattr(module, "launch", lambda *_, **__: None)
    tables = (launch._tile_table, launch._range_table, launch._on_device)
    for table in tables:
        table.cache_clear()

    def misses():
        return [table.cache_info().misses for table in tables]

    weight = packed_experts.MXFP4Weight(*(torch.zeros(E, O, 1, *rest, dtype=torch.uint8) for rest in ((16,), ())))
    rows, h, factor = torch.zeros(600, O, dtype=torch.bfloat16), torch.zeros(600, R), torch.zeros(E, R, O)
    layers = [torch.randint(E, (600,)).bincount(minlength=E).cumsum(0).tolist() for _ in range(num_layers)]
    for ends in layers:
        packed_experts.grouped_linear(rows, weight, torch.zeros(E, O), ends)
        low_rank.low_rank_up_(rows, low_rank.low_rank_down(rows, factor, ends), factor, 1.0, ends)
    low_rank.low_rank_gradient_(factor, h, rows, 1.0, layers[0])
    (tiles, _, ends_of_chunks), before = misses(), misses()
    assert (tiles, ends_of_chunks) == (num_layers, 12 * num_layers)
    for ends in reversed(layers):
        packed_experts.grouped_linear_dx(rows, weight, ends)
        low_rank.low_rank_up_(rows, low_rank.low_rank_down(rows, factor, ends), factor, 1.0, ends)
    assert misses() == before
    # One that was dropped is built again.
    dropped = launch.tile_table(layers[0], 16, cpu)
    launch._tile_table.cache_clear()
    again = launch.tile_table(layers[0], 16, cpu)
    assert again is not dropped and torch.equal(again, dropped)


def test_a_table_is_found_only_by_what_it_was_built_for_and_on_its_stream(monkeypatch):
    cpu, meta, ends = torch.device("cpu"), torch.device("meta"), [3, 8]
    monkeypatch.setattr(launch, "_copied", lambda table, where: table.to(where, copy=True))
    found = []
    for stream in (0, 7):
        monkeypatch.setattr(launch, "_stream", lambda where, stream=stream: stream)
        found += [
            *(launch.tile_table(ends, 2, where) for where in (cpu, meta)),
            *(launch.tile_table(*other, cpu) for other in ((ends, 4), ([4, 8], 2))),
            *(launch.tile_table(ends, 2, cpu, experts) for experts in ({0}, {1})),
            *(launch.range_table(ends, where) for where in (cpu, meta)),
            *(launch.on_device(ends, where) for where in (cpu, meta)),
        ]
    assert len({id(table) for table in found}) == len(found)
    assert [table.device for table in found[:2]] == [cpu, meta]


def test_a_chunk_of_decoded_weights_stays_within_its_bytes_and_no_row_is_left_out(monkeypatch):
    shapes = []
    monkeypatch.setattr(packed_experts, "_dequantize_into", lambda out, *_: shapes.append(tuple(out.shape)))
    monkeypatch.setattr(packed_experts, "CHUNK_BYTES", 3 * 64 * 32 * 2)
    weight = packed_experts.MXFP4Weight(*(torch.zeros(8, 64, 1, *rest, dtype=torch.uint8) for rest in ((16,), ())))
    chunks = packed_experts._decoded_chunks(weight, [2, 2, 5, 5, 5, 5, 6, 9], torch.bfloat16)
    assert [(experts, rows, ends) for experts, rows, ends, _ in chunks] == [
        (slice(0, 3), slice(0, 5), [2, 2, 5]),
        (slice(6, 8), slice(5, 9), [1, 4]),
    ]
    assert shapes == [(3, 64, 32), (2, 64, 32)]
