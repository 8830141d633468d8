"""A whole training step in the implementations for GPUs, on the CPU: Triton interpreted, flex_attention uncompiled.

`test_triton_kernels` runs this file in a process of its own: whether Triton interprets is settled when it is imported.
Everything is fp32, which the interpreter multiplies without dropping bits; each implementation that runs has passed its
self-check first, as on a GPU.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex

from gptoss_ft.adapters.attach import Targets, attach_adapters, lora_layers
from gptoss_ft.adapters.merged import compute_merged
from gptoss_ft.data.collate import PaddingCollator
from gptoss_ft.kernels import dispatch, flex_attention, verdicts
from gptoss_ft.kernels.gpu import packed_experts
from gptoss_ft.kernels.registry import REFERENCE, Implementation
from gptoss_ft.model.init import init_checkpoint
from gptoss_ft.model.load import load_base
from gptoss_ft.model.spec import SPECS
from gptoss_ft.training.loss import summed_loss

ROWS = ("grouped_linear", "grouped_linear_dx", "clamped_swiglu", "weighted_swiglu_backward", "combine")
LORA = ("low_rank_down", "low_rank_gradient_")
IN_TRAINING = {*((operation, "triton") for operation in (*ROWS, *LORA)), ("sink_attention", "flex_attention")}
BESIDE_WEIGHTS = {("low_rank_up_", "triton")}
IN_MERGING = {("merge_mxfp4_dithered", "triton"), ("merge_bf16", "triton")}


def checkpoint(folder: Path, num_layers: int) -> Path:
    spec = replace(
        SPECS["tiny"],
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=num_layers,
        num_local_experts=4,
        num_experts_per_tok=2,
        vocab_size=512,
        sliding_window=8,
        eos_token_id=500,
        pad_token_id=0,
    )
    return init_checkpoint(spec, folder, seed=1, progress=False)


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Packed rows of several documents, one of them padded."""
    rows = []
    for lengths in ((21, 1, 9), (12, 6)):
        ids = torch.randint(1, 500, (sum(lengths),)).tolist()
        rows.append({"input_ids": ids, "labels": ids, "document_lengths": list(lengths)})
    return PaddingCollator(pad_token_id=0)(rows)


@pytest.fixture(scope="module", autouse=True)
def nothing_known(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No verdict of an earlier process; those of this file are shared, for checks take most of its time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(verdicts, "_verdicts", {})
        yield


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch's uncompiled mode needs for gradients on a CPU."""
    torch.manual_seed(0)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex_attention, "_compiled", lambda function: function)


@contextmanager
def only(
    chosen: Callable[[Implementation[Any, Any]], bool], expected: Collection[tuple[str, str]] = ()
) -> Iterator[Counter[tuple[str, str]]]:
    """Operations run in the implementations that are `chosen`, or else in the reference, and what runs is counted.

    Those `expected` pass their self-checks first.
    """
    ran: Counter[tuple[str, str]] = Counter()

    def counted(operation: str, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            ran[operation, name] += 1
            return function(*args, **kwargs)

        return run

    with pytest.MonkeyPatch.context() as patch:
        for operation in dispatch.OPERATIONS:
            made = [
                replace(
                    each,
                    function=counted(operation.name, each.name, each.function),
                    device_type="cpu",
                    unavailable=lambda device, dtype: "",
                    # Beside fp32 rows, fp32 factors are nothing new.
                    check_sizes=tuple(size for size in each.check_sizes if size.factors is None),
                )
                for each in operation.implementations
                if chosen(each)
            ]
            patch.setattr(operation, "implementations", tuple(made))
            patch.setattr(operation, "reference", counted(operation.name, REFERENCE, operation.reference))
            for each in made:
                if (operation.name, each.name) in expected:
                    verdict = operation.verdict(each, torch.device("cpu"), torch.float32)
                    assert verdict.passed, f"{operation.name} in {each.name}: {verdict.reason}"
        ran.clear()
        yield ran


def for_gpus(implementation: Implementation[Any, Any]) -> bool:
    return implementation.device_type == "cuda"


def adapted(folder: Path, *, num_layers: int, merged: bool) -> torch.nn.Module:
    base = load_base(checkpoint(folder, num_layers), dtype=torch.float32, attn_implementation="gptoss_ft")
    targets = Targets.parse(["all"], num_layers=num_layers, num_experts=4)
    model, _ = attach_adapters(base, targets, r=4, alpha=8)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    if merged:
        compute_merged(model)
    return model.train()


def step(model: torch.nn.Module, batch: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    loss = summed_loss(model, model.get_base_model(), batch)
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("fused_rows", "num_layers", "merged", "checkpointing"),
    # Two layers have both windows of attention.
    [("1000000", 2, False, False), ("0", 1, False, True), ("1000000", 1, True, True)],
    ids=["fused", "decoded", "merged"],
)
def test_loss_and_gradients_are_those_of_the_reference(
    fused_rows, num_layers, merged, checkpointing, batch, tmp_path, monkeypatch
):
    monkeypatch.setenv(packed_experts.FUSED_ROWS_VARIABLE, fused_rows)
    model = adapted(tmp_path / "model", num_layers=num_layers, merged=merged)
    with only(lambda each: False):
        loss, gradients = step(model, batch)
    if checkpointing:
        model.get_base_model().activation_checkpointing_enable()
    expected_to_run = IN_TRAINING | (IN_MERGING if merged else BESIDE_WEIGHTS)
    with only(for_gpus, expected_to_run) as ran:
        found_loss, found = step(model, batch)
    assert ran.keys() >= expected_to_run
    assert not {(operation, REFERENCE) for operation, name in ran if name != REFERENCE} & ran.keys()
    assert len(gradients) == num_layers * 2 * 6 and found.keys() == gradients.keys()
    assert found_loss == pytest.approx(loss, rel=1e-6)
    for name, expected in gradients.items():
        assert expected.norm() > 0 and (found[name] - expected).norm() <= 1e-4 * expected.norm(), name
