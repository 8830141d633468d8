"""transformers' Trainer, with the loss in nats per loss token and no more logits than one chunk."""

import time
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from gptoss_ft.training.loss import num_loss_tokens, summed_loss
from gptoss_ft.training.memory import peak_gib


class SftTrainer(Trainer):
    """Trains on the mean over all loss tokens of an optimiser step, however they are split into batches and devices."""

    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, loss_chunk_size: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.loss_chunk_size = loss_chunk_size
        # Makes Trainer count the loss tokens of a whole step before its first backward pass.
        self.model_accepts_loss_kwargs = True
        self._num_tokens, self._since = 0, time.perf_counter()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Summed cross entropy over `num_items_in_batch`, the loss tokens of the whole step over all devices."""
        core = self.accelerator.unwrap_model(model).get_base_model()
        loss = summed_loss(model, core, inputs, chunk_size=self.loss_chunk_size)
        if model.training:
            self._num_tokens += int(inputs["attention_mask"].sum())
        if num_items_in_batch is None:
            num_items_in_batch = num_loss_tokens(inputs)
        loss = loss / num_items_in_batch
        if model.training:
            # DDP averages gradients over processes, but the divisor above counts the tokens of all of them.
            loss = loss * self.accelerator.num_processes
        return (loss, {}) if return_outputs else loss

    @torch.no_grad()
    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict:
        """Cross entropy in nats over every held-out loss token, each with the same weight."""
        core = self.accelerator.unwrap_model(self.model).get_base_model()
        was_training = self.model.training
        self.model.eval()
        totals = torch.zeros(2, dtype=torch.float64)
        for batch in self.get_eval_dataloader(eval_dataset):
            batch = self._prepare_inputs(batch)
            loss = summed_loss(self.model, core, batch, chunk_size=self.loss_chunk_size)
            totals += torch.tensor([float(loss), num_loss_tokens(batch)], dtype=torch.float64)
        self.model.train(was_training)
        loss_sum, num_tokens = self.accelerator.reduce(totals.to(self.args.device, torch.float64)).tolist()
        metrics = {f"{metric_key_prefix}_loss": loss_sum / num_tokens, f"{metric_key_prefix}_tokens": int(num_tokens)}
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's log with speed and peak memory beside each training loss."""
        if "loss" in logs:
            now = time.perf_counter()
            logs["tokens_per_s"] = self._num_tokens / (now - self._since)
            logs["peak_gib"] = peak_gib()
            self._num_tokens, self._since = 0, now
        super().log(logs, start_time)
