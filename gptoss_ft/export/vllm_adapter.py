"""LoRA adapters for vLLM, which takes PEFT's layout; what it refuses was read in the sources of 0.33.0."""

from pathlib import Path

from gptoss_ft.adapters.peft_files import CONFIG_FILE, read_config
from gptoss_ft.errors import UserError
from gptoss_ft.export.adapter import export_adapter, read_adapter
from gptoss_ft.export.deltas import LowRankDelta
from gptoss_ft.model.checkpoint import Checkpoint

# The values that `--max-lora-rank` takes; an adapter's rank has to be no larger.
MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
EXPERTS = ("gate_up_proj", "down_proj")


def export_adapter_vllm(folder: Path, out: Path, base: Checkpoint) -> Path:
    """Copy an adapter to the new folder `out` once it is known to fit `base` and vLLM; returns `out`.

    Raises:
        UserError: as `export_adapter`; if the rank is above vLLM's largest, or a layer has an update of only one of
            its two expert projections. Nothing is left behind.
    """
    check_experts(folder, read_adapter(folder, base.spec))
    max_lora_rank(folder)
    return export_adapter(folder, out, base)


def max_lora_rank(folder: Path) -> int:
    """The least `--max-lora-rank` with which vLLM loads a PEFT adapter.

    Raises:
        UserError: if there is none.
    """
    config = read_config(folder)
    ranks = {"r": config["r"], **{f"rank_pattern of {k}": r for k, r in (config.get("rank_pattern") or {}).items()}}
    field, rank = max(ranks.items(), key=lambda item: item[1])
    for allowed in MAX_LORA_RANKS:
        if rank <= allowed:
            return allowed
    raise UserError(
        f"{folder / CONFIG_FILE}: {field} is {rank}, and vLLM's max_lora_rank ends at {MAX_LORA_RANKS[-1]}: "
        "train with a smaller adapter.r, or export a merged format (mxfp4, bf16)"
    )


def check_experts(folder: Path, deltas: dict[str, LowRankDelta]) -> None:
    """Raise UserError, naming the missing projection, where a layer has LoRA on one of them: vLLM asserts both."""
    for name in deltas:
        stem, _, projection = name.rpartition(".")
        if projection not in EXPERTS:
            continue
        (other,) = set(EXPERTS) - {projection}
        if f"{stem}.{other}" not in deltas:
            raise UserError(
                f"{folder}: the adapter's target_parameters have {stem}.{projection} without {other}, and vLLM loads "
                "LoRA on both expert projections of a layer only: train adapter.targets=experts, or export "
                "adapter_sglang, adapter_gguf or a merged format (mxfp4, bf16)"
            )
