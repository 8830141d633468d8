"""Merge-aware fine-tuning (quantization-aware LoRA): what was trained is, to the bit, what the merged files hold.

Rounding a merged update to the nearest 4 bits after training loses what is smaller than half a step of the grid. Here
the rounding keeps updates of any size in the mean, see `kernels.merging.round_dithered`; every forward pass, held-out
evaluations included, computes with the rounded weights, and gradients go straight through the rounding to the factors.
Everything else is `sft`.
"""

from pathlib import Path

from peft import PeftModel
from transformers import GptOssForCausalLM

from gptoss_ft.adapters.merged import compute_merged
from gptoss_ft.config.schema import AdapterConfig, TrainConfig
from gptoss_ft.recipes import sft


def main(cfg: TrainConfig) -> Path:
    """Run `gptoss-ft train adapter.qat=true`; returns the run folder. Raises as `sft.run_training` does."""
    return sft.run_training(cfg, attach_merged)


def attach_merged(base: GptOssForCausalLM, cfg: AdapterConfig, seed: int) -> PeftModel:
    """`sft.attach`, computing with the weights that `export` writes."""
    return compute_merged(sft.attach(base, cfg, seed))
