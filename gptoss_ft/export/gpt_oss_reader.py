"""Open checkpoints with OpenAI's reference implementation, one of its blocks at a time.

E experts · B tokens · K experts of each
"""

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from gptoss_ft.errors import UserError
from gptoss_ft.export.readers import LayerByLayer, NotRun
from gptoss_ft.model import layouts
from gptoss_ft.model.checkpoint import Checkpoint

# It declares Python 3.12 and a server's dependencies; the model needs neither.
INSTALL = "pip install --no-deps --ignore-requires-python gpt-oss==0.0.9"


def open_with_gpt_oss(folder: Path) -> LayerByLayer:
    """A folder in HF names or the implementation's own, read through its own `Checkpoint`.

    Raises:
        NotRun: if it is not installed; when it reads, if the memory does not suffice.
    """
    checkpoint = Checkpoint.open(folder)
    reference, weights = _import_gpt_oss("model"), _import_gpt_oss("weights")
    config, cpu = reference.ModelConfig(**checkpoint.spec.original_config()), torch.device("cpu")
    source = (
        weights.Checkpoint(str(folder), cpu)
        if checkpoint.layout == "original"
        else _original_names(weights.Checkpoint)(checkpoint)
    )

    def filled(module: nn.Module, name: str) -> nn.Module:
        for part, parameter in module.named_parameters():
            parameter.data.copy_(source.get(f"{name}.{part}"))
            parameter.data = parameter.data.float()
        return module

    def open_ends(*names: str) -> list[nn.Module]:
        # Not on the CPU: all of it would be filled with random numbers first.
        ends = reference.Transformer(replace(config, num_hidden_layers=0), torch.device("meta"))
        return [filled(getattr(ends, name).to_empty(device=cpu), name) for name in names]

    def open_embedding() -> Callable[[Tensor], Tensor]:
        return open_ends("embedding")[0]

    def open_layer(number: int) -> Callable[[Tensor], Tensor]:
        block = filled(reference.TransformerBlock(config, number, cpu), f"block.{number}")
        for name in ("mlp1_weight", "mlp2_weight"):
            weight = getattr(block.mlp, name)
            delattr(block.mlp, name)
            setattr(block.mlp, name, _Experts(weight))
        return block

    def open_head() -> Callable[[Tensor], Tensor]:
        return nn.Sequential(*open_ends("norm", "unembedding"))

    return LayerByLayer(checkpoint.spec, open_embedding, open_layer, open_head)


class _Experts:
    """Weights `[E, out, in]` of which the reference implementation takes those of each token's experts, as a copy.

    Of gpt-oss-20b that is 0.4 GB a token and layer. Here they are only named, and their products are taken expert by
    expert.
    """

    def __init__(self, weight: Tensor, chosen_BK: Tensor | None = None) -> None:
        self.weight, self.chosen_BK = weight, chosen_BK

    def __getitem__(self, key: tuple[Tensor, Any]) -> "_Experts":
        return _Experts(self.weight, key[0])

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Tensor], _types: Any, args: tuple[Any, ...] = (), _kwargs: Any = None
    ) -> Tensor:
        if function is not torch.einsum or args[0] not in ("beck,bk->bec", "beck,bek->bec"):
            raise UserError(f"the installed gpt-oss computes its experts by other means than 0.0.9: {INSTALL}")
        _, experts, rows = args
        out = rows.new_empty(*experts.chosen_BK.shape, experts.weight.shape[1])
        for expert in experts.chosen_BK.unique().tolist():
            token, slot = (experts.chosen_BK == expert).nonzero(as_tuple=True)
            inputs = rows[token] if rows.dim() == 2 else rows[token, slot]
            out[token, slot] = inputs @ experts.weight[expert].T
        return out


def _import_gpt_oss(part: str) -> ModuleType:
    try:
        return import_module(f"gpt_oss.torch.{part}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "gpt_oss":
            raise
        raise NotRun(f"the gpt-oss package is not installed: {INSTALL}") from error


def _original_names(reference_checkpoint: type[Any]) -> type[Any]:
    """The reference implementation's reader of checkpoints, with tensors found under their HF names.

    Its decoding of MXFP4 is untouched; dense experts, which its layout does not have, are turned to [E, out, in].
    """

    class HuggingFaceNames(reference_checkpoint):
        def __init__(self, checkpoint: Checkpoint) -> None:
            super().__init__(str(checkpoint.path), torch.device("cpu"))
            self.dense = checkpoint.layout == "bf16"
            for hf_name in checkpoint.spec.tensors("mxfp4"):
                if hf_name in self.tensor_name_to_file:
                    self.tensor_name_to_file[layouts.to_original(hf_name)] = self.tensor_name_to_file[hf_name]

        def get(self, name: str) -> Tensor:
            if self.dense and name.endswith(("mlp1_weight", "mlp2_weight")):
                (blocks,) = layouts.to_hf(f"{name}.blocks")
                return super()._get_tensor(blocks.removesuffix("_blocks")).transpose(1, 2)
            return super().get(name)

        def _get_tensor(self, name: str) -> Tensor:
            return torch.cat([super(HuggingFaceNames, self)._get_tensor(part) for part in layouts.to_hf(name)])

    return HuggingFaceNames
