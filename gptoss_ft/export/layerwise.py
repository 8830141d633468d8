"""What a model calls its first decoder layer with, so that others can run the layers one by one."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GptOssForCausalLM

Arguments = list[list[dict[str, Any]]]
"""By row and layer: masks, positions and what else a layer is called with beside the hidden states."""


def first_states(
    model: GptOssForCausalLM, rows: Sequence[Sequence[int] | Tensor], dtype: torch.dtype
) -> tuple[list[Tensor], Arguments]:
    """What the first layer is given for the token ids of each row, `[1, T, H]`, and the other arguments of every layer.

    Rows are run one at a time, so there is no padding.
    """
    core = model.model
    layers, recorders = core.layers, [_Recorder() for _ in core.layers]
    hidden, arguments = [], []
    # The model makes masks and positions; in place of its layers, recorders note what it would call them with.
    core.layers = nn.ModuleList(recorders)
    try:
        with torch.no_grad():
            for ids in rows:
                embedded = core.embed_tokens(torch.as_tensor(ids)[None]).to(dtype)
                core(inputs_embeds=embedded, use_cache=False)
                hidden.append(recorders[0].hidden)
                arguments.append([recorder.arguments for recorder in recorders])
    finally:
        core.layers = layers
    return hidden, arguments


class _Recorder(nn.Module):
    """Stands in for a decoder layer and keeps what it is called with."""

    hidden: Tensor
    arguments: dict[str, Any]

    def forward(self, hidden: Tensor, **arguments: Any) -> Tensor:
        self.hidden, self.arguments = hidden, arguments
        return hidden
