"""What keys take: the choices, what they mean where several sections share them, and checks.

A key's section calls the checks when it is built.
"""

from dataclasses import field
from datetime import date
from enum import StrEnum
from typing import Any, Literal

from gptoss_ft.errors import ConfigError

# Members are spelled as users write them: OmegaConf reads and writes an enum by its names.
Shape = StrEnum("Shape", ["tiny", "gpt_oss_20b", "gpt_oss_120b"])
Layout = StrEnum("Layout", ["mxfp4", "bf16", "original"])
Precision = StrEnum("Precision", ["mxfp4", "bf16"])
Dtype = StrEnum("Dtype", ["bfloat16", "float32"])
# Ours, and the one of transformers that knows attention sinks on every device.
AttnImplementation = StrEnum("AttnImplementation", ["gptoss_ft", "eager"])
Target = StrEnum(
    "Target",
    ["attention", "experts", "all", "q_proj", "k_proj", "v_proj", "o_proj", "router", "gate_up_proj", "down_proj"],
)
DataFormat = StrEnum(
    "DataFormat",
    [
        "auto",
        "messages",
        "multilingual_thinking",
        "openai_chat",
        "openai_preference",
        "openai_responses",
        "openai_rft",
        "prompt_completion",
        "preference",
        "sharegpt",
        "alpaca",
        "harmony",
    ],
)
OnError = StrEnum("OnError", ["stop", "skip"])
ReasoningEffort = StrEnum("ReasoningEffort", ["low", "medium", "high"])
BuiltinTool = StrEnum("BuiltinTool", ["browser", "python"])
LossPolicy = StrEnum("LossPolicy", ["all", "last_turn", "final_only", "no_reasoning", "tool_calls_only"])
MissingReasoning = StrEnum("MissingReasoning", ["keep", "low_effort", "mask_channel", "drop"])
# transformers' SchedulerType, without the schedules that need further arguments.
Schedule = StrEnum(
    "Schedule",
    [
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
    ],
)
Optim = StrEnum("Optim", ["adamw_torch", "adamw_8bit", "paged_adamw_8bit"])
Reporter = StrEnum("Reporter", ["none", "wandb", "tensorboard"])
ExportFormat = StrEnum(
    "ExportFormat",
    [
        "adapter",
        "adapter_vllm",
        "adapter_sglang",
        "adapter_gguf",
        "bf16",
        "mxfp4",
        "original",
        "gguf",
        "gguf_q8_0",
    ],
)
Rounding = StrEnum("Rounding", ["nearest", "dithered", "calibrated"])
# Those that hold MXFP4 experts, whose updates are rounded to 4 bits.
ROUNDED_FORMATS = (ExportFormat.mxfp4, ExportFormat.original, ExportFormat.gguf, ExportFormat.gguf_q8_0)
ROUNDING_MEANING = (
    "how MXFP4 formats round updates of experts: each number to nearest; dithered, each by a threshold of its own, "
    "which keeps small updates in the mean and adds noise; or calibrated, together for their inputs on the run's rows. "
    "A run with adapter.qat=true is dithered, as it was in training"
)
TOKENS_MEANING = "tokens of the run's training rows that rounding=calibrated looks at"
# Half way between the base and the trained model.
MIN_FIDELITY = 0.5
MIN_FIDELITY_MEANING = "share of the way from base to trained model that a merged model has to keep; 0 takes any"
FIDELITY_TOKENS_MEANING = "tokens of held-out rows that measure what a merged model keeps; 0 measures nothing"

ATTENTION_TARGETS = (Target.attention, Target.all, Target.q_proj, Target.k_proj, Target.v_proj, Target.o_proj)


def key(meaning: str, *, reads: Literal["file", "folder", "rows"] | None = None, **options: Any) -> Any:
    """A dataclass field with its one-line meaning; `reads` marks a path that has to exist before the command starts."""
    return field(metadata={"meaning": meaning, "reads": reads}, **options)


def require(ok: bool, name: str, wanted: str, got: object) -> None:
    """Raise `ConfigError` naming the key unless `ok`."""
    if not ok:
        raise ConfigError(f"{name} must be {wanted}, got {got}")


def is_date(text: str | None) -> bool:
    """Whether `text` is a day as YYYY-MM-DD, or None."""
    try:
        return text is None or date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def require_seed(seed: int) -> None:
    """Raise `ConfigError` for a seed that NumPy, the narrowest of the generators, does not take."""
    require(0 <= seed < 2**32, "seed", f"from 0 to {2**32 - 1}", seed)


def check_rounding(rounding: Rounding, num_tokens: int, formats: list[ExportFormat], prefix: str = "") -> None:
    """Raise `ConfigError` for a calibration on nothing, or a way to round nothing."""
    require(num_tokens >= 1, f"{prefix}calibration_tokens", "1 or more", num_tokens)
    if rounding is not Rounding.nearest and not set(formats) & set(ROUNDED_FORMATS):
        raise ConfigError(
            f"{prefix}rounding={rounding} is for formats that round experts ({', '.join(ROUNDED_FORMATS)}), "
            f"not {', '.join(formats) or 'for none'}"
        )


def check_fidelity(min_fidelity: float, num_tokens: int, prefix: str = "") -> None:
    """Raise `ConfigError` for a bound that nothing keeps, and for less than no tokens."""
    require(0 <= min_fidelity <= 1, f"{prefix}min_fidelity", "in [0, 1]", min_fidelity)
    require(num_tokens >= 0, f"{prefix}fidelity_tokens", "0 or more", num_tokens)
