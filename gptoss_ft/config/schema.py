"""Every key a user can set: its type, its default, its meaning and the values it takes.

A field without a default is required. Each section checks itself when it is built.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from math import inf
from typing import Any, Literal

from gptoss_ft.errors import ConfigError

# Members are spelled as users write them: OmegaConf reads and writes an enum by its names.
Shape = StrEnum("Shape", ["tiny", "gpt_oss_20b", "gpt_oss_120b"])
Layout = StrEnum("Layout", ["mxfp4", "bf16", "original"])
Precision = StrEnum("Precision", ["mxfp4", "bf16"])
Dtype = StrEnum("Dtype", ["bfloat16", "float32"])
# Ours, and those of transformers' implementations that know attention sinks, but for the flash-attention kernels made
# for one GPU family.
AttnImplementation = StrEnum("AttnImplementation", ["eager", "flex_attention", "gptoss_ft"])
Target = StrEnum(
    "Target",
    ["attention", "experts", "all", "q_proj", "k_proj", "v_proj", "o_proj", "router", "gate_up_proj", "down_proj"],
)
DataFormat = StrEnum("DataFormat", ["messages"])
ReasoningEffort = StrEnum("ReasoningEffort", ["low", "medium", "high"])
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
ExportFormat = StrEnum("ExportFormat", ["adapter", "bf16", "mxfp4"])

ATTENTION_TARGETS = (Target.attention, Target.all, Target.q_proj, Target.k_proj, Target.v_proj, Target.o_proj)


def key(meaning: str, *, reads: Literal["file", "folder"] | None = None, **options: Any) -> Any:
    """A dataclass field with its one-line meaning; `reads` marks a path that has to exist before the command starts."""
    return field(metadata={"meaning": meaning, "reads": reads}, **options)


def require(ok: bool, name: str, wanted: str, got: object) -> None:
    """Raise `ConfigError` naming the key unless `ok`."""
    if not ok:
        raise ConfigError(f"{name} must be {wanted}, got {got}")


def require_seed(seed: int) -> None:
    """Raise `ConfigError` for a seed that NumPy, the narrowest of the generators, does not take."""
    require(0 <= seed < 2**32, "seed", f"from 0 to {2**32 - 1}", seed)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    dir: str = key("folder for everything the run writes")
    resume: bool = key("go on from the newest checkpoint in run.dir", default=False)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    path: str = key("checkpoint folder of the base model: MXFP4, bf16 or the original OpenAI layout", reads="folder")
    precision: Precision = key("experts stay packed MXFP4, or are expanded to bf16", default=Precision.mxfp4)
    dtype: Dtype = key("dtype of everything but the packed experts", default=Dtype.bfloat16)
    init: Shape | None = key("shape to write with random weights if model.path does not exist", default=None)
    attn_implementation: AttnImplementation = key(
        "transformers' eager or flex_attention (needs a GPU), or gptoss_ft: memory linear in the length",
        default=AttnImplementation.eager,
    )


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    r: int = key("LoRA rank", default=16)
    alpha: float = key("LoRA scale: the update is multiplied by alpha / r", default=32.0)
    use_rslora: bool = key("scale by alpha / sqrt(r) instead", default=False)
    dropout: float = key("dropout before the attention adapters; the experts have none", default=0.0)
    targets: list[Target] = key(
        "projections that learn; attention is q_proj to o_proj, experts is gate_up_proj and down_proj, all is both",
        default_factory=lambda: [Target.attention, Target.experts],
    )
    layers: list[int] | None = key("layers that learn, from 0; null is every layer", default=None)
    experts: list[int] | None = key("experts that learn in those layers, from 0; null is every expert", default=None)

    def __post_init__(self) -> None:
        require(self.r >= 1, "adapter.r", "1 or more", self.r)
        require(0 < self.alpha < inf, "adapter.alpha", "above 0 and finite", self.alpha)
        require(0 <= self.dropout < 1, "adapter.dropout", "in [0, 1)", self.dropout)
        require(bool(self.targets), "adapter.targets", "at least one name", "none")
        for name in ("layers", "experts"):
            chosen = getattr(self, name)
            fine = chosen is None or (bool(chosen) and min(chosen) >= 0 and len(set(chosen)) == len(chosen))
            require(fine, f"adapter.{name}", "null or different numbers from 0 up", chosen)
        if self.dropout and not set(self.targets) & set(ATTENTION_TARGETS):
            raise ConfigError(
                "adapter.dropout must be 0 unless adapter.targets names an attention projection: "
                "no other adapter has dropout"
            )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    path: list[str] = key("JSONL file or files of training rows", reads="file")
    format: DataFormat = key("schema of the rows", default=DataFormat.messages)
    eval_path: list[str] | None = key("JSONL file or files of held-out rows", reads="file", default=None)
    eval_fraction: float = key("share of the training rows to hold out instead", default=0.0)
    max_length: int = key("longest sample, in tokens", default=4096)
    reasoning_effort: ReasoningEffort = key("effort written for rows that state none", default=ReasoningEffort.medium)

    def __post_init__(self) -> None:
        require(bool(self.path), "data.path", "at least one file", "none")
        require(self.eval_path != [], "data.eval_path", "null or at least one file", "none")
        require(0 <= self.eval_fraction < 1, "data.eval_fraction", "in [0, 1)", self.eval_fraction)
        require(self.max_length >= 2, "data.max_length", "2 or more", self.max_length)
        if self.eval_path and self.eval_fraction:
            raise ConfigError("data.eval_fraction must be 0 when data.eval_path names the held-out rows")


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Names and meanings of `transformers.TrainingArguments`, but for `eval_steps`, `save_steps` and the last key."""

    max_steps: int = key("optimiser steps; -1 lets num_train_epochs decide", default=-1)
    num_train_epochs: float = key("passes over the training rows", default=1.0)
    learning_rate: float = key("highest learning rate", default=2e-4)
    lr_scheduler_type: Schedule = key("course of the learning rate after warm-up", default=Schedule.cosine)
    warmup_steps: float = key("warm-up in steps, or as a share of all steps if below 1", default=0.0)
    per_device_train_batch_size: int = key("samples in one forward pass", default=1)
    per_device_eval_batch_size: int = key("samples in one evaluation pass", default=1)
    gradient_accumulation_steps: int = key("forward passes in one optimiser step", default=8)
    optim: Optim = key("optimiser; the 8-bit ones are from bitsandbytes", default=Optim.adamw_torch)
    weight_decay: float = key("AdamW weight decay", default=0.0)
    max_grad_norm: float = key("gradient norm to clip at; 0 does not clip", default=1.0)
    gradient_checkpointing: bool = key("recompute activations to save memory", default=True)
    logging_steps: int = key("steps between two lines of metrics; a loss is the mean over them", default=1)
    eval_steps: int = key("steps between evaluations; 0 evaluates before the first and after the last", default=0)
    save_steps: int = key(
        "steps between checkpoints; 0 writes none: only the adapter at the end, and a run that stops cannot resume",
        default=0,
    )
    save_total_limit: int = key("checkpoints to keep", default=2)
    report_to: list[Reporter] = key("where metrics also go", default_factory=lambda: [Reporter.none])
    loss_chunk_size: int = key("tokens whose 201,088 logits exist at once", default=256)

    def __post_init__(self) -> None:
        require(self.max_steps == -1 or self.max_steps > 0, "trainer.max_steps", "-1 or above 0", self.max_steps)
        epochs, rate = self.num_train_epochs, self.learning_rate
        require(0 < epochs < inf, "trainer.num_train_epochs", "above 0 and finite", epochs)
        wanted = "above 0 and at most 1 (AdamW moves each weight by about that much in a step)"
        require(0 < rate <= 1, "trainer.learning_rate", wanted, rate)
        for name in ("warmup_steps", "weight_decay", "max_grad_norm"):
            require(0 <= getattr(self, name) < inf, f"trainer.{name}", "0 or more and finite", getattr(self, name))
        for name in ("eval_steps", "save_steps"):
            require(getattr(self, name) >= 0, f"trainer.{name}", "0 or more", getattr(self, name))
        for name in (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "logging_steps",
            "save_total_limit",
            "loss_chunk_size",
        ):
            require(getattr(self, name) >= 1, f"trainer.{name}", "1 or more", getattr(self, name))
        alone = Reporter.none not in self.report_to or len(self.report_to) == 1
        require(bool(self.report_to) and alone, "trainer.report_to", "none or other names", ", ".join(self.report_to))


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    formats: list[ExportFormat] = key("formats to write when training ends", default_factory=list)
    verify: bool = key("reopen each export and compare it with the trained model", default=True)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """`gptoss-ft train`"""

    run: RunConfig
    model: ModelConfig
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    seed: int = key("seed of the initial weights and of the order of samples", default=0)

    def __post_init__(self) -> None:
        require_seed(self.seed)


@dataclass(frozen=True, kw_only=True)
class InitCommand:
    """`gptoss-ft init`"""

    model: Shape = key("shape to write")
    out: str = key("folder to create")
    seed: int = key("seed of the weights", default=0)
    layout: Layout = key("the published MXFP4 layout, bf16 or OpenAI's original", default=Layout.mxfp4)

    def __post_init__(self) -> None:
        require_seed(self.seed)


@dataclass(frozen=True, kw_only=True)
class ExportCommand:
    """`gptoss-ft export`"""

    run: str = key("run folder that `gptoss-ft train` made", reads="folder")
    format: ExportFormat = key("what to write")
    out: str = key("folder to create")
    base: str | None = key("base checkpoint, if it has moved since training", reads="folder", default=None)


@dataclass(frozen=True, kw_only=True)
class VerifyCommand:
    """`gptoss-ft verify`"""

    run: str = key("run folder that `gptoss-ft train` made", reads="folder")
    path: str = key("export to compare with the trained model", reads="folder")
    data: str | None = key("JSONL file to compare on; null takes the run's held-out rows", reads="file", default=None)
    base: str | None = key("base checkpoint, if it has moved since training", reads="folder", default=None)
    max_tokens: int = key("tokens to compare", default=512)

    def __post_init__(self) -> None:
        require(self.max_tokens >= 1, "max_tokens", "1 or more", self.max_tokens)
