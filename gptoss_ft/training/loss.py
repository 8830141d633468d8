"""The loss of a batch of generations, without the logits of 201,088 classes ever existing at once."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gptoss_ft.kernels.loss import chunked_cross_entropy

IGNORED = -100


def summed_loss(model: nn.Module, core: PreTrainedModel, batch: dict[str, Tensor], *, chunk_size: int = 256) -> Tensor:
    """Cross entropy in nats, summed over the labels of `batch` that are not -100; a scalar in at least fp32.

    Args:
        model: what is called, so that wrappers such as DDP see the forward pass; `core` or a wrapper around it.
        core: the causal language model inside.
        batch: `input_ids`, `attention_mask` and unshifted `labels`, each `[rows, length]`.
    """
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    hidden = last_hidden_state(model, core, inputs)[:, :-1]
    targets = batch["labels"][:, 1:]
    kept = targets != IGNORED
    return chunked_cross_entropy(
        hidden[kept], core.get_output_embeddings().weight, targets[kept], chunk_size=chunk_size
    )


def last_hidden_state(model: nn.Module, core: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """The final normalised hidden states `[rows, length, hidden]` of a forward pass through `model`."""
    caught: list[Tensor] = []
    handle = core.base_model.register_forward_hook(lambda _module, _args, output: caught.append(output[0]))
    try:
        # The model insists on logits: one position of each row is the least it makes.
        model(**inputs, logits_to_keep=1, use_cache=False)
    finally:
        handle.remove()
    return caught[0]


@torch.no_grad()
def num_loss_tokens(batch: dict[str, Tensor]) -> int:
    """How many labels `summed_loss` sums over."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())
