"""What a run shows and writes while it trains: a progress bar, and metrics as lines of JSON."""

import json
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

# Trainer's names, to names that carry the unit.
UNITS = {"loss": "loss_nats", "eval_loss": "eval_loss_nats", "train_runtime": "train_runtime_s"}


class ProgressCallback(TrainerCallback):
    """One bar over the optimiser steps: loss, tokens per second, peak memory, and the time that is left."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="step")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        if self.bar is None:
            return
        if "loss" in logs:
            self.bar.set_postfix_str(
                f"loss {logs['loss']:.3f} nats, {logs['tokens_per_s']:.0f} tokens/s, peak {logs['peak_gib']:.1f} GiB"
            )
        if "eval_loss" in logs:
            self.bar.write(f"step {state.global_step}: held-out loss {logs['eval_loss']:.3f} nats per token")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        """End the bar's line; again does nothing."""
        if self.bar is not None:
            self.bar.close()


class MetricsCallback(TrainerCallback):
    """Appends every log to `metrics.jsonl`, with the step, and units in the names."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        if state.is_world_process_zero:
            line = {"step": state.global_step, **{UNITS.get(name, name): value for name, value in logs.items()}}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
