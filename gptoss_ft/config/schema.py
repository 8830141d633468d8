"""Every key of a training run: its type, its default, its meaning and the values it takes.

A field without a default is required. Each section checks itself when it is built.
"""

from dataclasses import dataclass, field
from math import inf

from gptoss_ft.config.values import (
    ATTENTION_TARGETS,
    FIDELITY_TOKENS_MEANING,
    MIN_FIDELITY,
    MIN_FIDELITY_MEANING,
    ROUNDING_MEANING,
    TOKENS_MEANING,
    AttnImplementation,
    BuiltinTool,
    DataFormat,
    Dtype,
    ExportFormat,
    LossPolicy,
    MissingReasoning,
    OnError,
    Optim,
    Precision,
    ReasoningEffort,
    Reporter,
    Rounding,
    Schedule,
    Shape,
    Target,
    check_fidelity,
    check_rounding,
    is_date,
    key,
    require,
    require_seed,
)
from gptoss_ft.errors import ConfigError


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
        "gptoss_ft takes memory linear in the length; eager is transformers' own, quadratic",
        default=AttnImplementation.gptoss_ft,
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
    qat: bool = key(
        "merge-aware training: compute with the merged weights, rounded as export rounds them (experts to MXFP4, the "
        "rest to bf16), so that the merged model is the trained one; only merged formats can be exported",
        default=False,
    )

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
        if self.qat and self.dropout:
            raise ConfigError("adapter.dropout must be 0 with adapter.qat=true: merged weights have no dropout")


@dataclass(frozen=True, kw_only=True)
class RowsConfig:
    """Which rows are read, and how; shared by training and the data commands."""

    path: list[str] = key("rows: files, folders, patterns such as rows/*.jsonl, or hf://owner/name", reads="rows")
    format: DataFormat = key("format of the rows; auto tells it from the first ones", default=DataFormat.auto)
    max_length: int = key("longest sample, in tokens", default=4096)
    policy: LossPolicy = key(
        "what has loss: all that the assistant writes, only what follows the last user message, only final answers, "
        "all but its reasoning, or only tool calls",
        default=LossPolicy.all,
    )
    preambles: bool = key("loss on what the assistant tells the user before it calls a tool", default=True)
    analysis_weight: float = key("weight of the loss on the analysis channel", default=1.0)
    commentary_weight: float = key("weight of the loss on the commentary channel", default=1.0)
    final_weight: float = key("weight of the loss on the final channel", default=1.0)
    missing_reasoning: MissingReasoning = key(
        "answers without reasoning before them, which teach not to reason: keep them, write `Reasoning: low` before "
        "them, have no loss on the choice of the channel, or drop them",
        default=MissingReasoning.keep,
    )
    reasoning_effort: ReasoningEffort = key("effort written for rows that state none", default=ReasoningEffort.medium)
    identity: str | None = key(
        "first line of the system message for rows that state none; null leaves it out",
        default="You are ChatGPT, a large language model trained by OpenAI.",
    )
    knowledge_cutoff: str | None = key("its `Knowledge cutoff:`; null leaves it out", default="2024-06")
    current_date: str | None = key("its `Current date:`, YYYY-MM-DD; null leaves it out", default=None)
    builtin_tools: list[BuiltinTool] = key(
        "tools of the model's own training that every row's system message offers", default_factory=list
    )
    on_error: OnError = key(
        "what a row that cannot be used does: stop everything, or be left out", default=OnError.stop
    )
    max_skipped: float = key("share of the rows that on_error=skip may leave out", default=0.05)
    skipped_path: str | None = key("JSONL file for the rows left out", default=None)
    num_processes: int = key("processes that read rows; 0 takes every core where there is enough to read", default=0)

    def __post_init__(self) -> None:
        require(bool(self.path), "data.path", "at least one file", "none")
        require(self.max_length >= 2, "data.max_length", "2 or more", self.max_length)
        require(0 <= self.max_skipped <= 1, "data.max_skipped", "in [0, 1]", self.max_skipped)
        require(self.num_processes >= 0, "data.num_processes", "0 or more", self.num_processes)
        weights = ("analysis_weight", "commentary_weight", "final_weight")
        for name in weights:
            require(0 <= getattr(self, name) < inf, f"data.{name}", "0 or more and finite", getattr(self, name))
        if not any(getattr(self, name) for name in weights):
            raise ConfigError("data.analysis_weight, commentary_weight and final_weight are all 0: nothing would learn")
        require(is_date(self.current_date), "data.current_date", "null or a day as YYYY-MM-DD", self.current_date)


@dataclass(frozen=True, kw_only=True)
class DataConfig(RowsConfig):
    eval_path: list[str] | None = key("held-out rows, as path names them", reads="rows", default=None)
    eval_fraction: float = key("share of the training rows to hold out instead", default=0.0)
    weights: list[float] | None = key(
        "times that a row of each entry of path is seen in an epoch; 0.5 draws half of them", default=None
    )
    cache: bool = key("keep compiled samples, and use those that are kept for the same rows and settings", default=True)
    cache_dir: str | None = key(
        "folder that keeps them; null is gptoss-ft/samples in the user's cache folder", default=None
    )
    packing: bool = key("fill rows of max_length tokens with several samples, none of them split", default=False)
    share_prefixes: bool = key(
        "with packing, compute once what the samples of a row of data have in common", default=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.eval_path != [], "data.eval_path", "null or at least one file", "none")
        require(0 <= self.eval_fraction < 1, "data.eval_fraction", "in [0, 1)", self.eval_fraction)
        if self.share_prefixes and not self.packing:
            raise ConfigError("data.share_prefixes needs data.packing=true: samples that share tokens share a row")
        if self.weights is not None:
            fine = len(self.weights) == len(self.path) and all(0 <= weight < inf for weight in self.weights)
            require(fine, "data.weights", "null or a finite number from 0 up for each entry of path", self.weights)
        if self.cache_dir and not self.cache:
            raise ConfigError("data.cache_dir must be null with data.cache=false, which keeps nothing there")
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
    rounding: Rounding = key(ROUNDING_MEANING, default=Rounding.nearest)
    calibration_tokens: int = key(TOKENS_MEANING, default=4096)
    min_fidelity: float = key(MIN_FIDELITY_MEANING, default=MIN_FIDELITY)
    fidelity_tokens: int = key(FIDELITY_TOKENS_MEANING, default=1024)

    def __post_init__(self) -> None:
        check_rounding(self.rounding, self.calibration_tokens, self.formats, "export.")
        check_fidelity(self.min_fidelity, self.fidelity_tokens, "export.")


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
        if self.adapter.qat:
            self._check_merged()

    def _check_merged(self) -> None:
        """What training through the merge needs, and what can be exported of it."""
        if self.model.precision is not Precision.mxfp4:
            raise ConfigError(
                f"adapter.qat=true needs model.precision=mxfp4, not {self.model.precision}: it rounds to the MXFP4 "
                "numbers of packed experts"
            )
        unmerged = [format for format in self.export.formats if format.startswith("adapter")]
        if unmerged:
            raise ConfigError(
                f"export.formats must not name {', '.join(unmerged)} with adapter.qat=true: the trained model is the "
                "merged one; name merged formats, such as mxfp4"
            )
        if self.export.rounding is Rounding.calibrated:
            raise ConfigError(
                "export.rounding=calibrated is another rounding than the one that adapter.qat=true trains through: "
                "leave it at its default"
            )
