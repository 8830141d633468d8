"""The choice of an implementation: refusals with reasons, self-checks that catch wrong results, and their cache."""

import json
import logging
import multiprocessing
import re
import time
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from gptoss_ft.kernels import cpu_library, dispatch, reference, registry, selfcheck, verdicts
from gptoss_ft.kernels.cases import AWKWARD, DEQUANTIZE_MXFP4, GROUPED_LINEAR, Call, Case, Draw, product_work
from gptoss_ft.kernels.reference import MXFP4Weight
from gptoss_ft.kernels.registry import Implementation, Operation

CPU = torch.device("cpu")
BF16 = torch.bfloat16
built = pytest.mark.skipif(cpu_library.library() is None, reason="the CPU library was not built: no C++ compiler")


@pytest.fixture(autouse=True)
def nothing_known(tmp_path, monkeypatch):
    """An empty cache, no memory of earlier checks, nothing said yet, and no instruction set forced."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(cpu_library.ISA_VARIABLE, raising=False)
    monkeypatch.setattr(verdicts, "_verdicts", {})
    for operation in dispatch.OPERATIONS:
        monkeypatch.setattr(operation, "_told", set())
    monkeypatch.setattr(registry, "_told_for_all", set())


def implementation(name, function, **changes):
    """One that takes everything on the CPU."""
    made = Implementation(name, function, "cpu", lambda device, dtype: "", lambda *operands: "")
    return replace(made, **changes)


def product(*implementations):
    return Operation(reference.grouped_linear, implementations, GROUPED_LINEAR)


def operands(dtype=BF16):
    return GROUPED_LINEAR.call(Draw(CPU, dtype), AWKWARD).args


def chosen_for(operation, dtype):
    call = operation.case.call(Draw(CPU, dtype), AWKWARD)
    return operation.choose(*call.args, **call.kwargs)


def wrong_by_3_per_cent(*arguments):
    return 1.03 * reference.grouped_linear(*arguments)


def all_but_the_last_row(x, weight, bias, ends):
    out = x.new_empty(x.shape[0], bias.shape[1])
    out[:-1] = reference.grouped_linear(x, weight, bias, ends)[:-1]
    return out


def right_where_memory_is(x, weight, bias, ends):
    """The last row is not written, and holds the right numbers by chance unless somebody cleared it."""
    out = x.new_empty(x.shape[0], bias.shape[1])
    lost = out[-1].isnan().all()
    out[:] = reference.grouped_linear(x, weight, bias, ends)
    if lost:
        out[-1] = torch.nan
    return out


def refused(choice):
    return {name: reason for name, reason, _ in choice.refused}


# Refusals


@built
def test_the_best_instruction_set_runs_and_the_better_ones_are_explained():
    supported = cpu_library.supported_isas()
    for operation in dispatch.OPERATIONS:
        choice = chosen_for(operation, operation.dtypes[0])
        assert choice.implementation == f"cpu/{supported[-1]}"
        assert choice.refused == tuple(
            (f"cpu/{isa}", cpu_library.MISSING[isa], False)
            for isa in reversed(cpu_library.ISAS)
            if isa not in supported
        )


@built
@pytest.mark.parametrize("isa", cpu_library.ISAS)
def test_a_forced_instruction_set_is_the_one_that_runs(isa, monkeypatch):
    if isa not in cpu_library.supported_isas():
        pytest.skip(f"this processor has no {isa}")
    monkeypatch.setenv(cpu_library.ISA_VARIABLE, isa)
    choice = dispatch.grouped_linear.choose(*operands())
    assert choice.implementation == f"cpu/{isa}"
    for other in set(cpu_library.supported_isas()[cpu_library.ISAS.index(isa) + 1 :]):
        assert refused(choice)[f"cpu/{other}"] == f"GPTOSS_FT_CPU_ISA={isa} is set: unset it to have the best one"
    seen = []
    monkeypatch.setattr(cpu_library, "check", lambda status: seen.append(cpu_library.common(BF16)[0]))
    dispatch.dequantize_mxfp4(*DEQUANTIZE_MXFP4.call(Draw(CPU, BF16), AWKWARD).args)
    assert seen and set(seen) == {cpu_library.ISAS.index(isa)}


@built
def test_each_implementation_computes_in_its_own_instruction_set(monkeypatch):
    seen = []
    monkeypatch.setattr(cpu_library, "check", lambda status: seen.append(cpu_library.common(BF16)[0]))
    call = DEQUANTIZE_MXFP4.call(Draw(CPU, BF16), AWKWARD)
    for made in dispatch.dequantize_mxfp4.implementations:
        if not made.unavailable(CPU, BF16):
            made.function(*call.args)
    assert seen == list(reversed(range(len(cpu_library.supported_isas()))))
    assert cpu_library.common(BF16)[0] == max(seen)


@built
def test_an_instruction_set_that_does_not_run_here_is_an_error(monkeypatch):
    monkeypatch.setenv(cpu_library.ISA_VARIABLE, "avx1024")
    with pytest.raises(ValueError, match="GPTOSS_FT_CPU_ISA=avx1024: this processor runs portable"):
        dispatch.grouped_linear(*operands())


def test_without_a_library_the_reference_runs_and_one_line_says_so(monkeypatch, caplog):
    monkeypatch.setattr(cpu_library, "fault", lambda: cpu_library.NOT_BUILT)
    with caplog.at_level(logging.INFO):
        results = [dispatch.grouped_linear(*operands()) for _ in range(2)]
        dispatch.dequantize_mxfp4(*DEQUANTIZE_MXFP4.call(Draw(CPU, BF16), AWKWARD).args)
    assert torch.equal(results[0], reference.grouped_linear(*operands()))
    why = (
        "in bf16 on cpu runs in plain torch, which is slower; cpu/avx512bf16 and cpu/avx2 and cpu/portable: the CPU "
        "library was not built: install gptoss-ft again where g++ or clang is found (`gptoss-ft doctor` lists every "
        "operation that this holds for)"
    )
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("WARNING", f"grouped_linear {why}"),
        ("INFO", f"dequantize_mxfp4 {why}"),
    ]


@built
@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("fp64", "it computes in fp32 and bf16, not float64"),
        ("strided", "packed weights are not contiguous uint8"),
        ("48 outputs", "48 output features are no multiple of 32"),
        ("gradient", "autograd is recording, and its results would have no gradient"),
    ],
)
def test_what_the_library_refuses_runs_in_the_reference_with_its_reason(case, reason, caplog):
    draw = Draw(CPU, torch.float64 if case == "fp64" else torch.float32)
    x, weight, ends = draw.normal(5, 64), draw.packed(2, 48 if case == "48 outputs" else 64, 64), [2, 5]
    if case == "strided":
        weight = MXFP4Weight(*(part.repeat_interleave(2, 0)[::2] for part in weight))
    x.requires_grad_(case == "gradient")
    y = dispatch.grouped_linear(x, weight, None, ends)
    assert torch.equal(y, reference.grouped_linear(x, weight, None, ends))
    assert y.requires_grad == (case == "gradient")
    assert len(caplog.records) == 1 and f"cpu/portable: {reason}" in caplog.text


def test_devices_without_kernels_and_mixed_devices_run_in_torch():
    x, weight, bias, ends = operands()
    far = x.to("meta"), MXFP4Weight(*(part.to("meta") for part in weight)), bias.to("meta"), ends
    operation = product(implementation("fast", reference.grouped_linear))
    assert operation.choose(*far).refused == (("kernels", "there is none for meta yet", False),)
    assert operation.choose(x, weight, far[2], ends).refused == (("fast", "operands are on different devices", False),)
    with pytest.raises(TypeError, match="floating dtype"):
        operation.choose(*weight)


def test_a_device_that_nobody_wrote_kernels_for_is_one_warning_and_no_word_of_slowness(caplog):
    x = operands()[0].to("meta")
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            dispatch.clamped_swiglu(x)
            dispatch.linear(x, x, None)
    why = "in bf16 on meta runs in plain torch; kernels: there is none for meta yet (`gptoss-ft doctor` lists every"
    told = [(record.levelname, record.message.partition(why)[0]) for record in caplog.records]
    assert told == [("WARNING", "clamped_swiglu "), ("INFO", "linear ")]


def test_where_torch_is_the_kernel_of_the_device_none_is_missed(monkeypatch, caplog):
    x, weight, bias, ends = operands()
    far = x.to("meta"), MXFP4Weight(*(part.to("meta") for part in weight)), bias.to("meta"), ends
    operation = product(implementation("fast", reference.grouped_linear))
    monkeypatch.setattr(operation, "torch_on", ("meta",))
    assert operation.choose(*far).refused == ()
    operation(*far)
    assert not caplog.records
    assert set(dispatch.linear.torch_on) == set(dispatch.linear_dx.torch_on) == {"cuda"}


@pytest.mark.parametrize("shape", [(2, 3, 16), (3, 16), (0, 16)])
def test_dispatched_decode_keeps_the_shape_and_errors_of_the_reference(shape):
    blocks = torch.randint(0, 256, shape, dtype=torch.uint8)
    scales = torch.randint(100, 130, shape[:-1], dtype=torch.uint8)
    for dtype in (BF16, torch.float32, torch.float64):
        expected = reference.dequantize_mxfp4(blocks, scales, dtype)
        assert torch.equal(dispatch.dequantize_mxfp4(blocks, scales, dtype), expected)
        with torch.device("meta"):  # as transformers sets while it loads
            assert torch.equal(dispatch.dequantize_mxfp4(blocks, scales, dtype), expected)
    with pytest.raises(ValueError, match="scales"):
        dispatch.dequantize_mxfp4(blocks[..., :8], scales, BF16)


# Self-checks


@built
def test_first_use_may_be_in_a_layer_that_is_recomputed():
    """Without held-out rows, the first pass of a training run is one that keeps nothing for its backward pass."""
    call = dispatch.sink_attention.case.call(Draw(CPU, torch.float32), AWKWARD)
    query, *others = call.args
    query.requires_grad_()

    def layer(query):
        return dispatch.sink_attention(query.tanh(), *others, **call.kwargs)

    def gradient(out):
        return torch.autograd.grad(out.square().sum(), query)[0]

    recomputed = gradient(checkpoint(layer, query, use_reentrant=False))
    assert verdicts._verdicts
    assert torch.equal(recomputed, gradient(layer(query)))


def raises(*arguments):
    raise OSError("no C compiler\nsecond line")


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (wrong_by_3_per_cent, r"error (2\.[5-9]|3\.[0-4])e-02 against fp64, allowed \d\.\de-03"),
        (all_but_the_last_row, r"error \S+ against fp64, allowed \d\.\de-03"),
        (right_where_memory_is, "error nan against fp64"),
        (lambda *arguments: reference.grouped_linear(*arguments)[:-1], r"the result is \(21, 96\) torch.bfloat16, not"),
        (lambda *arguments: reference.grouped_linear(*arguments).float(), r"torch.float32, not \(22, 96\)"),
        (lambda *arguments: (reference.grouped_linear(*arguments),) * 2, r"ValueError: zip\(\) argument 2 is shorter"),
        (raises, r"OSError: no C compiler\): please report"),
    ],
)
def test_a_wrong_kernel_is_refused_with_one_warning_and_the_next_one_runs(function, found, caplog):
    def right(*arguments):
        return reference.grouped_linear(*arguments) + 0

    operation = product(implementation("wrong", function), implementation("right", right))
    for _ in range(2):
        assert torch.equal(operation(*operands()), reference.grouped_linear(*operands()))
    choice = operation.choose(*operands())
    assert choice.implementation == "right"
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.message.startswith("grouped_linear in bf16 on cpu runs in right; wrong: failed its self-check (")
    assert re.search(found, record.message)


def test_the_last_resort_is_torch(caplog):
    operation = product(implementation("wrong", wrong_by_3_per_cent))
    assert torch.equal(operation(*operands()), reference.grouped_linear(*operands()))
    assert "runs in plain torch, which is slower; wrong: failed its self-check" in caplog.text


def test_exact_operations_may_not_differ_in_a_bit():
    def nearly(*arguments):
        values = reference.dequantize_mxfp4(*arguments)
        values.view(torch.int32)[-1, -1, -1] ^= 1
        return values

    arguments = DEQUANTIZE_MXFP4.call(Draw(CPU, torch.float32), AWKWARD).args
    for exact, runs in ((False, "nearly"), (True, "torch")):
        made = Operation(reference.dequantize_mxfp4, (implementation("nearly", nearly),), DEQUANTIZE_MXFP4, exact=exact)
        verdicts.forget(CPU)
        assert made.choose(*arguments).implementation == runs


def test_a_kernel_that_refuses_its_own_check_never_runs_unchecked():
    def needs_128(x, *_):
        return "" if x.shape[1] == 128 else "needs 128 inputs"

    operation = product(implementation("picky", wrong_by_3_per_cent, refusal=needs_128))
    draw = Draw(CPU, BF16)
    choice = operation.choose(draw.normal(5, 128), draw.packed(2, 64, 128), None, [2, 5])
    assert choice.implementation == "torch"
    assert "refuses the operands to be checked on: needs 128 inputs" in refused(choice)["picky"]


@pytest.mark.parametrize(("factor", "runs"), [(1.0, "in place"), (1.03, "torch")])
def test_an_operation_may_change_its_first_argument(factor, runs):
    def add_(y, x, scaling):
        y += scaling * x

    def ours(y, x, scaling):
        y += factor * scaling * x
        x.zero_()

    case = Case(lambda draw, size: Call((draw.normal(3, 5), draw.normal(3, 5), 2.0)), product_work)
    operation = Operation(add_, (implementation("in place", ours),), case)
    assert operation.choose(torch.ones(2), torch.ones(2), 1.0).implementation == runs


def test_memory_is_not_poisoned_for_what_takes_its_own():
    compiled = implementation("compiled", right_where_memory_is, poisoned=False)
    assert product(compiled).choose(*operands()).implementation == "compiled"


def test_every_code_path_that_has_a_size_is_checked():
    def wrong_with_many_rows(x, *others):
        return reference.grouped_linear(x, *others) * (1.03 if len(x) > 100 else 1)

    many_rows = replace(AWKWARD, rows_E=(200, 1, 30))
    few = implementation("few", wrong_with_many_rows)
    assert product(few).choose(*operands()).implementation == "few"
    both = implementation("both", wrong_with_many_rows, check_sizes=(AWKWARD, many_rows))
    assert product(both).choose(*operands()).implementation == "torch"


@pytest.mark.parametrize(
    ("operation", "factor"),
    [
        (dispatch.low_rank_down, 1),
        (dispatch.low_rank_up_, 2),
        (dispatch.low_rank_gradient_, 0),
        (dispatch.merge_bf16, 1),
    ],
    ids=lambda given: getattr(given, "name", ""),
)
def test_lora_is_checked_with_fp32_factors_beside_bf16_rows(operation, factor):
    """Those are the factors of training, and other code runs for them than for bf16 ones."""

    def wrong_in_fp32(*arguments):
        changed = arguments[factor].dtype == torch.float32
        if changed and factor:
            arguments = (*arguments[:factor], 1.03 * arguments[factor], *arguments[factor + 1 :])
        result = operation.reference(*arguments)
        if changed and not factor:
            arguments[0].mul_(1.03)
        return result

    for made in operation.implementations:
        for function, passes in ((operation.reference, True), (wrong_in_fp32, False)):
            assert operation._check(replace(made, function=function), CPU, BF16).passed == passes


def scaled(x, y, *, factor):
    return x * y.sigmoid() * factor


class _ScaledWrongly(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, factor):
        ctx.save_for_backward(x, y)
        ctx.factor = factor
        return scaled(x, y, factor=factor)

    @staticmethod
    def backward(ctx, d_out):
        x, y = ctx.saved_tensors
        gate = y.sigmoid()
        return d_out * gate * ctx.factor, 1.03 * d_out * x * gate * (1 - gate) * ctx.factor, None


def test_a_differentiable_operation_is_checked_with_its_gradients(caplog):
    case = Case(lambda draw, size: Call((draw.normal(3, 5), draw.normal(3, 5)), {"factor": 2.0}), product_work)
    wrong = implementation("wrong", lambda x, y, *, factor: _ScaledWrongly.apply(x, y, factor))
    wrong = replace(wrong, refusal=lambda x, y, *, factor: "")
    x, y = torch.randn(2, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    forward_only = Operation(scaled, (wrong,), case)
    with torch.no_grad():
        assert forward_only.choose(x, y, factor=1.0).implementation == "wrong"
    assert "no gradient" in refused(forward_only.choose(x, y, factor=1.0))["wrong"]
    verdicts.forget(CPU)
    for mode in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        verdicts.forget(CPU)
        with mode:
            choice = Operation(scaled, (wrong,), case, differentiable=True).choose(x, y, factor=1.0)
        assert "error 3.0e-02 against fp64" in refused(choice)["wrong"]
    verdicts.forget(CPU)
    right = replace(wrong, function=lambda x, y, *, factor: factor * (y.sigmoid() * x))
    operation = Operation(scaled, (right,), case, differentiable=True)
    torch.autograd.gradcheck(lambda a, b: operation(a, b, factor=0.5), (x.double(), y.double()))
    assert operation.choose(x, y, factor=1.0).implementation == "wrong"
    assert not caplog.records


def test_a_check_changes_nothing_around_it():
    operation = product(implementation("right", lambda *arguments: reference.grouped_linear(*arguments)))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with torch.enable_grad(), torch.autocast("cpu", dtype=torch.float16):
        assert operation.choose(*operands(torch.float32)).implementation == "right"
        assert torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")
    assert torch.equal(torch.get_rng_state(), before)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, blocks, scales, ends):
        ctx.save_for_backward(blocks, scales)
        ctx.ends = ends
        return dispatch.grouped_linear(x, MXFP4Weight(blocks, scales), None, ends)

    @staticmethod
    def backward(ctx, dy):
        return dispatch.grouped_linear_dx(dy, MXFP4Weight(*ctx.saved_tensors), ctx.ends), None, None, None


@built
def test_first_use_may_be_inside_an_autograd_function():
    x, weight, _, ends = operands(torch.float32)
    x.requires_grad_()
    y = _Product.apply(x, *weight, ends)
    (got,) = torch.autograd.grad(y.square().sum(), x)
    (wanted,) = torch.autograd.grad(reference.grouped_linear(x, weight, None, ends).square().sum(), x)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert {key.operation for key in verdicts._verdicts} == {"grouped_linear", "grouped_linear_dx"}


# The cache


@pytest.fixture
def counted(monkeypatch):
    """An operation whose only implementation counts its checks, and the counts."""
    checks = []
    measure = selfcheck.measure
    monkeypatch.setattr(selfcheck, "measure", lambda *given, **options: checks.append(1) or measure(*given, **options))
    return product(implementation("counted", reference.grouped_linear)), checks


def next_process(monkeypatch):
    monkeypatch.setattr(verdicts, "_verdicts", {})


def the_file():
    (file,) = verdicts.cache_folder().iterdir()
    return file


def test_a_kernel_is_checked_once_for_this_and_later_processes(counted, monkeypatch):
    operation, checks = counted
    for _ in range(3):
        operation.choose(*operands())
    assert len(checks) == 1
    next_process(monkeypatch)
    operation.choose(*operands())
    assert len(checks) == 1
    operation.choose(*operands(torch.float32))
    assert len(checks) == 2
    next_process(monkeypatch)
    operation.choose(*operands())
    operation.choose(*operands(torch.float32))
    assert len(checks) == 2


@pytest.mark.parametrize("change", ["kernels", "torch", "triton", "device"])
def test_another_environment_is_checked_anew(counted, change, monkeypatch):
    operation, checks = counted
    operation.choose(*operands())
    next_process(monkeypatch)
    other = {**verdicts.environment(CPU), change: "other"}
    monkeypatch.setattr(verdicts, "environment", lambda device: other)
    operation.choose(*operands())
    assert len(checks) == 2


def test_the_environment_tells_builds_and_devices_apart(monkeypatch, tmp_path):
    before = verdicts.environment(CPU)
    assert before["torch"] == torch.__version__ and before["device"] == verdicts.cpu_name()
    monkeypatch.setattr(verdicts, "environment", verdicts.environment.__wrapped__)
    assert verdicts.environment(CPU) == before
    (tmp_path / "library").write_bytes(b"rebuilt")
    monkeypatch.setattr(cpu_library, "library_file", lambda: tmp_path / "library")
    assert {name for name, value in verdicts.environment(CPU).items() if value != before[name]} == {"kernels"}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    gpu = verdicts.environment(torch.device("cuda", 0))
    assert (gpu["device"], gpu["capability"]) == ("NVIDIA L4", "8.9") and "driver" in gpu


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"environment": {}, "verdicts": {}}', "\x00\xff", "null"],
)
def test_a_corrupted_file_is_ignored_and_rewritten(counted, content, monkeypatch):
    operation, checks = counted
    operation.choose(*operands())
    whole = the_file().read_text()
    the_file().write_bytes(content.encode("latin-1"))
    next_process(monkeypatch)
    operation.choose(*operands())
    assert len(checks) == 2
    assert json.loads(the_file().read_text()) == json.loads(whole)


@pytest.mark.parametrize("damage", [[], {"grouped_linear counted torch.bfloat16": 0}, {"x": ["a", 1]}])
def test_damaged_verdicts_are_ignored_and_rewritten(counted, damage, monkeypatch):
    operation, checks = counted
    operation.choose(*operands())
    content = json.loads(the_file().read_text())
    the_file().write_text(json.dumps({**content, "verdicts": damage}))
    next_process(monkeypatch)
    operation.choose(*operands())
    assert len(checks) == 2
    assert json.loads(the_file().read_text()) == content


def test_a_failure_is_remembered_and_said_again_but_an_exception_is_tried_again(monkeypatch, caplog):
    failing, raising = (product(implementation("bad", function)) for function in (wrong_by_3_per_cent, raises))
    failing(*operands())
    next_process(monkeypatch)
    again = product(implementation("bad", pytest.fail))
    again(*operands())
    assert [record.message for record in caplog.records] == [caplog.records[0].message] * 2
    the_file().unlink()
    next_process(monkeypatch)
    raising(*operands())
    assert not list(verdicts.cache_folder().iterdir())
    next_process(monkeypatch)
    mended = product(implementation("bad", reference.grouped_linear))
    assert mended.choose(*operands()).implementation == "bad"


def test_a_folder_that_cannot_be_written_costs_only_the_memory(counted, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    operation, checks = counted
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            assert operation.choose(*operands()).implementation == "counted"
    assert len(checks) == 1
    assert "run again in every process" in caplog.text


def write_many(process):
    for entry in range(20):
        key = verdicts.Key(f"operation{process}", f"kernel{entry}", CPU, BF16)
        verdicts.remember(key, selfcheck.Verdict(process, entry))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork")
def test_processes_that_write_at_once_leave_a_whole_file():
    verdicts.environment(CPU)
    processes = [multiprocessing.get_context("fork").Process(target=write_many, args=(n,)) for n in range(6)]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        for file in verdicts.cache_folder().glob("*.json"):
            json.loads(file.read_text())
    assert [process.exitcode for process in processes] == [0] * 6
    written = json.loads(the_file().read_text())["verdicts"]
    assert written
    for entry, (error, budget) in written.items():
        assert entry == f"operation{error:.0f} kernel{budget:.0f} torch.bfloat16"


# Costs


@built
def test_all_checks_of_the_cpu_take_well_under_a_second():
    verdicts.environment(CPU)  # reads the sources, once
    start = time.process_time()
    for operation in dispatch.OPERATIONS:
        for dtype in operation.dtypes:
            chosen_for(operation, dtype)
    # 0.25 s on one thread here. Further threads only wait, but that counts too.
    assert time.process_time() - start < 1
    assert len(verdicts._verdicts) == sum(len(operation.dtypes) for operation in dispatch.OPERATIONS)


@built
def test_a_dispatched_call_costs_microseconds():
    # The library's own refusals and lookups, with nothing to compute behind them.
    idle = [replace(made, function=lambda *arguments: None) for made in dispatch.grouped_linear.implementations]
    operation, arguments = product(*idle), operands()
    dispatch.grouped_linear(*arguments)
    best = min(_seconds_of(operation, arguments, 500) for _ in range(10))
    # 14 us here; twice that is room for a slower processor.
    assert best < 30e-6


def _seconds_of(operation, arguments, calls):
    start = time.process_time()
    for _ in range(calls):
        operation(*arguments)
    return (time.process_time() - start) / calls
