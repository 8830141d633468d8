"""Run a model straight from its files, a decoder layer and an expert at a time, in fp32.

What is computed with is what any checkpoint or GGUF file of ours holds, through the reader that checked it: nothing of
what wrote it takes part. Memory holds one layer without its experts, and one expert.

T tokens · K experts per token · N rows of one expert · H hidden · P positions · V vocabulary
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssDecoderLayer, GptOssRMSNorm

from gptoss_ft.export.gguf_read import GgufModel
from gptoss_ft.export.weights import expert_weight
from gptoss_ft.kernels.dispatch import clamped_swiglu
from gptoss_ft.model.checkpoint import Checkpoint

# Rows of the head that are widened at once: 94 MB at 2,880 columns.
HEAD_ROWS = 8192

Stored = Checkpoint | GgufModel


class StoredModel:
    """The parts of a gpt-oss model in files.

    Args:
        config: of the model; its attention implementation is used.
    """

    def __init__(self, files: Stored, config: GptOssConfig) -> None:
        self.files = files
        self.config = config

    def embed(self, input_ids_T: Tensor) -> Tensor:
        """`[T, H]`"""
        rows = {id: self.files.read("model.embed_tokens.weight", id, id + 1) for id in set(input_ids_T.tolist())}
        return torch.cat([rows[id] for id in input_ids_T.tolist()]).float()

    def layer(self, number: int) -> GptOssDecoderLayer:
        """A decoder layer whose experts read their weights when they are called."""
        prefix = f"model.layers.{number}."
        with torch.device("meta"):
            layer = GptOssDecoderLayer(self.config, number)
        layer.mlp.experts = _StoredExperts(self.files, f"{prefix}mlp.experts", self.config)
        tensors = {name: self.files.read(f"{prefix}{name}").float() for name, _ in layer.named_parameters()}
        layer.load_state_dict(tensors, assign=True)
        return layer.requires_grad_(False).eval()

    def logits(self, hidden_PH: Tensor) -> Tensor:
        """`[P, V]`"""
        norm = GptOssRMSNorm(self.config.hidden_size, self.config.rms_norm_eps)
        norm.weight = nn.Parameter(self.files.read("model.norm.weight").float(), requires_grad=False)
        vocab_size = self.config.vocab_size
        return head_logits(norm(hidden_PH), vocab_size, lambda *rows: self.files.read("lm_head.weight", *rows))


def head_logits(hidden_PH: Tensor, vocab_size: int, read: Callable[[int, int], Tensor]) -> Tensor:
    """The head's product `[P, V]`, its rows `read(start, stop)` widened in pieces."""
    starts = range(0, vocab_size, HEAD_ROWS)
    pieces = [hidden_PH @ read(start, min(start + HEAD_ROWS, vocab_size)).float().T for start in starts]
    return torch.cat(pieces, dim=-1)


@contextmanager
def widened(module: nn.Module) -> Iterator[None]:
    """The module's bf16 parameters are fp32 within the block; those of a mapped file stay mapped."""
    narrow = [(parameter, parameter.data) for parameter in module.parameters() if parameter.dtype == torch.bfloat16]
    for parameter, data in narrow:
        parameter.data = data.float()
    try:
        yield
    finally:
        for parameter, data in narrow:
            parameter.data = data


class _StoredExperts(nn.Module):
    """`GptOssExperts` that keeps its biases only."""

    def __init__(self, files: Stored, name: str, config: GptOssConfig) -> None:
        super().__init__()
        self.files, self.name = files, name
        self.alpha, self.limit = config.swiglu_alpha, config.swiglu_limit
        for projection, size in (("gate_up_proj", 2 * config.intermediate_size), ("down_proj", config.hidden_size)):
            bias = torch.empty(config.num_local_experts, size, device="meta")
            self.register_parameter(f"{projection}_bias", nn.Parameter(bias, requires_grad=False))

    def forward(self, hidden_TH: Tensor, experts_TK: Tensor, routing_weights_TK: Tensor) -> Tensor:
        out_TH = torch.zeros_like(hidden_TH)
        for expert in experts_TK.unique().tolist():
            token_N, slot_N = (experts_TK == expert).nonzero(as_tuple=True)
            gate_up = self._project(hidden_TH[token_N], "gate_up_proj", expert)
            act = clamped_swiglu(gate_up, alpha=self.alpha, limit=self.limit)
            y_NH = self._project(act, "down_proj", expert)
            out_TH.index_add_(0, token_N, y_NH * routing_weights_TK[token_N, slot_N, None])
        return out_TH

    def _project(self, x: Tensor, projection: str, expert: int) -> Tensor:
        weight = expert_weight(self.files, f"{self.name}.{projection}", expert)
        return x @ weight.T + getattr(self, f"{projection}_bias")[expert]
