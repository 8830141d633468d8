"""The loss of a batch of generations, without the logits of 201,088 classes ever existing at once."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from gptoss_ft.kernels.loss import chunked_cross_entropy
from gptoss_ft.model.documents import document_masks

IGNORED = -100


def summed_loss(model: nn.Module, core: PreTrainedModel, batch: dict[str, Tensor], *, chunk_size: int = 256) -> Tensor:
    """Cross entropy in nats, times its weight and summed over the labels of `batch`; a scalar in at least fp32.

    Args:
        model: what is called, so that wrappers such as DDP see the forward pass; `core` or a wrapper around it.
        core: the causal language model inside.
        batch: `input_ids`, `attention_mask` and unshifted `labels`, each `[rows, length]`; and, of that shape,
            `loss_weights`, without which every label weighs 1 (and -100 nothing); `position_ids` and `document_ids`
            if the rows are packed; `visible_until` and `predicted_from` if with prefix trees.
    """
    hidden = last_hidden_state(model, core, model_inputs(core, batch))
    weights = label_weights(batch)
    row, place = weights.nonzero(as_tuple=True)
    before = batch["predicted_from"][row, place] if "predicted_from" in batch else place - 1
    head, targets = core.get_output_embeddings().weight, batch["labels"][row, place]
    return chunked_cross_entropy(hidden[row, before], head, targets, weights[row, place], chunk_size)


def model_inputs(core: PreTrainedModel, batch: dict[str, Tensor]) -> dict[str, Any]:
    """What of `batch` the model is called with; packed rows get masks that keep their documents apart."""
    inputs: dict[str, Any] = {name: batch[name] for name in ("input_ids", "attention_mask")}
    if "document_ids" in batch:
        documents, positions = batch["document_ids"], batch["position_ids"]
        inputs["position_ids"] = positions
        inputs["attention_mask"] = document_masks(
            core.config, documents, positions, core.dtype, visible_until=batch.get("visible_until")
        )
    return inputs


def label_weights(batch: dict[str, Tensor]) -> Tensor:
    """`[rows, length]`: how much the prediction of each token counts, 0 if not at all; nothing predicts the first."""
    weights = batch["loss_weights"] if "loss_weights" in batch else (batch["labels"] != IGNORED).float()
    return F.pad(weights[:, 1:], (1, 0))


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
    return int(label_weights(batch).count_nonzero())


@torch.no_grad()
def total_weight(batch: dict[str, Tensor]) -> float:
    """The sum of the weights of these labels, by which `summed_loss` is to be divided."""
    return float(label_weights(batch).double().sum())
