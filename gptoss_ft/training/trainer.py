"""transformers' Trainer, with the loss in nats per loss token and no more logits than one chunk."""

import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from gptoss_ft.adapters.save import portable_config
from gptoss_ft.errors import UserError
from gptoss_ft.files import naming_a_full_disk
from gptoss_ft.training.loss import num_loss_tokens, summed_loss, total_weight
from gptoss_ft.training.memory import peak_gib


class SftTrainer(Trainer):
    """Trains on the weighted mean over the loss tokens of an optimiser step, however batches and devices split them."""

    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, loss_chunk_size: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.loss_chunk_size = loss_chunk_size
        # Makes Trainer hand over `_get_num_items_in_batch` of a whole step.
        self.model_accepts_loss_kwargs = True
        # Input tokens since the last log, and when it was; pauses move it forward.
        self._num_tokens, self._since = 0, time.perf_counter()
        self._staging: Path | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's training loop, with the clock of `tokens_per_s` started."""
        self._num_tokens, self._since = 0, time.perf_counter()
        return super().train(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Summed cross entropy over `num_items_in_batch`, the loss weights of the whole step over all devices."""
        core = self.accelerator.unwrap_model(model).get_base_model()
        loss = summed_loss(model, core, inputs, chunk_size=self.loss_chunk_size)
        loss = loss / (total_weight(inputs) if num_items_in_batch is None else num_items_in_batch)
        if model.training:
            self._num_tokens += int(inputs["attention_mask"].sum())
            # DDP averages gradients over processes, but the divisor above counts the tokens of all of them.
            loss = loss * self.accelerator.num_processes
        return (loss, {}) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        # Trainer asks before the first backward pass of a step, and counts labels; ours have weights.
        total = torch.tensor([sum(map(total_weight, batch_samples))], dtype=torch.float64)
        return torch.tensor(self._sum_over_processes(total)[0], device=device)

    @torch.no_grad()
    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict:
        """The weighted mean of the cross entropy in nats over every held-out loss token."""
        with self._clock_stopped():
            metrics = self._evaluate(self.eval_dataset if eval_dataset is None else eval_dataset, metric_key_prefix)
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _evaluate(self, dataset: Any, prefix: str) -> dict[str, float]:
        # Each process takes its own rows: a sampler that gave all of them equally many would repeat some.
        mine = Subset(dataset, range(self.args.process_index, len(dataset), self.args.world_size))
        totals = torch.zeros(3, dtype=torch.float64)
        model = self.accelerator.unwrap_model(self.model)
        was_training = model.training
        model.eval()
        for batch in DataLoader(mine, batch_size=self.args.eval_batch_size, collate_fn=self.data_collator):
            batch = self._prepare_inputs(batch)
            loss = summed_loss(model, model.get_base_model(), batch, chunk_size=self.loss_chunk_size)
            totals += torch.tensor([float(loss), total_weight(batch), num_loss_tokens(batch)], dtype=torch.float64)
        model.train(was_training)
        loss_sum, weight, num_tokens = self._sum_over_processes(totals)
        return {f"{prefix}_loss": loss_sum / weight, f"{prefix}_tokens": int(num_tokens)}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's log with speed and peak memory beside each training loss.

        Raises:
            UserError: if the loss is no longer a number.
        """
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                raise UserError(
                    f"training diverged: the loss is {logs['loss']} at step {self.state.global_step}; "
                    "lower trainer.learning_rate or add trainer.warmup_steps"
                )
            now = time.perf_counter()
            (num_tokens,) = self._sum_over_processes(torch.tensor([self._num_tokens], dtype=torch.float64))
            logs["tokens_per_s"] = num_tokens / (now - self._since)
            logs["peak_gib"] = peak_gib()
            self._num_tokens, self._since = 0, now
        super().log(logs, start_time)

    def _sum_over_processes(self, numbers: Tensor) -> list[float]:
        return self.accelerator.reduce(numbers.to(self.args.device)).tolist()

    @contextmanager
    def _clock_stopped(self) -> Iterator[None]:
        """Keep what is done meanwhile out of `tokens_per_s`."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def _get_output_dir(self, trial: Any) -> str:
        # Where Trainer puts a checkpoint, and looks for older ones to delete.
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Trainer's checkpoint, with an adapter that stock PEFT loads; under its final name once it is whole."""
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        final = Path(self.args.output_dir) / name
        self._staging = final.with_name(f".{name}.partial")
        try:
            with self._clock_stopped(), naming_a_full_disk(final), _torch_write_errors(final):
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    portable_config(self.accelerator.unwrap_model(self.model)).save_pretrained(self._staging / name)
                    shutil.rmtree(final, ignore_errors=True)
                    os.replace(self._staging / name, final)
        finally:
            if self.args.should_save:
                shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None
        if self.args.should_save:
            rotate_checkpoints(self.args.output_dir, self.args.save_total_limit, use_mtime=True)


@contextmanager
def _torch_write_errors(path: Path) -> Iterator[None]:
    """`torch.save` reports a full disk as a RuntimeError of its archive writer."""
    try:
        yield
    except RuntimeError as error:
        if "inline_container" not in str(error) and "PytorchStreamWriter" not in str(error):
            raise
        raise UserError(f"{path} could not be written, most likely for a full disk: free some room") from error
