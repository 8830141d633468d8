"""Open checkpoints with transformers, and adapters with PEFT on them, one decoder layer at a time.

A part is transformers' model with stand-ins for all others. `from_pretrained` reads and decodes the part's tensors from
the folder, under the names that they have there, and no others.

T tokens · H hidden · V vocabulary
"""

import weakref
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import GptOssConfig, GptOssForCausalLM, Mxfp4Config
from transformers.utils import logging

from gptoss_ft.errors import UserError
from gptoss_ft.export.adapter import read_adapter, write_as_peft
from gptoss_ft.export.readers import LayerByLayer, NotRun
from gptoss_ft.export.sglang_adapter import read_adapter_sglang
from gptoss_ft.model.checkpoint import Checkpoint
from gptoss_ft.model.load import dense_config, state_dict

EMBEDDING, NORM, HEAD = "model.embed_tokens", "model.norm", "lm_head"


def open_with_transformers(folder: Path) -> LayerByLayer:
    """transformers' own `from_pretrained`, with its own decoding of MXFP4.

    Raises:
        NotRun: if the folder is in the original layout; when it reads, if the memory does not suffice.
        UserError: when it reads, if transformers finds tensors missing or superfluous.
    """
    checkpoint = Checkpoint.open(folder)
    if checkpoint.layout == "original":
        raise NotRun("transformers does not read the original layout")
    return _layer_by_layer(checkpoint, lambda number: _open_part(checkpoint, _layer(number)))


def open_with_peft(base: Path, adapter: Path) -> LayerByLayer:
    """Stock PEFT's `PeftModel.from_pretrained` on transformers' dense model of the base.

    A base in the original layout, which transformers does not read, is put into its model class as `load_base` does.

    Raises:
        NotRun: when it reads, if the memory does not suffice.
    """
    checkpoint = Checkpoint.open(base)
    adapted = {int(name.split(".")[2]) for name in read_adapter(adapter, checkpoint.spec)}

    def open_layer(number: int) -> GptOssForCausalLM:
        part = _open_part(checkpoint, _layer(number))
        # PEFT refuses a model with nothing to adapt.
        return PeftModel.from_pretrained(part, str(adapter)).eval().get_base_model() if number in adapted else part

    return _layer_by_layer(checkpoint, open_layer)


def open_sglang_adapter_with_peft(base: Path, export: Path) -> LayerByLayer:
    """Stock PEFT on the factors of an adapter for SGLang, brought into PEFT's layout in a temporary folder.

    Raises:
        NotRun: when it reads, if the memory does not suffice.
    """
    folder = TemporaryDirectory()
    write_as_peft(read_adapter_sglang(export, Checkpoint.open(base).spec), Path(folder.name))
    reader = open_with_peft(base, Path(folder.name))
    weakref.finalize(reader, folder.cleanup)
    return reader


def _layer(number: int) -> str:
    return f"model.layers.{number}"


def _layer_by_layer(checkpoint: Checkpoint, open_layer: Callable[[int], GptOssForCausalLM]) -> LayerByLayer:
    def embedding() -> Callable[[Tensor], Tensor]:
        return _open_part(checkpoint, EMBEDDING).model.embed_tokens

    def layer(number: int) -> Callable[[Tensor], Tensor]:
        core = open_layer(number).model
        return lambda hidden_TH: core(inputs_embeds=hidden_TH[None], use_cache=False).last_hidden_state[0]

    def head() -> Callable[[Tensor], Tensor]:
        part = _open_part(checkpoint, NORM, HEAD)
        return lambda hidden_PH: part.lm_head(part.model.norm(hidden_PH))

    return LayerByLayer(checkpoint.spec, embedding, layer, head)


def _open_part(checkpoint: Checkpoint, *names: str) -> GptOssForCausalLM:
    """The model with the modules of these names in fp32, and stand-ins for all others."""
    options: dict[str, Any] = {}
    if checkpoint.layout == "mxfp4":
        options["quantization_config"] = Mxfp4Config(dequantize=True)
    elif checkpoint.layout == "original":
        tensors = state_dict(checkpoint, packed=False, dtype=torch.bfloat16, modules=names)
        options |= {"config": dense_config(checkpoint), "state_dict": tensors}
    verbosity, progress_bar_was_on = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    # It warns of every tensor that is no part's.
    logging.set_verbosity_error()
    try:
        model, report = _part_class(names).from_pretrained(
            None if "state_dict" in options else checkpoint.path,
            dtype=torch.bfloat16,
            attn_implementation="eager",
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    finally:
        logging.set_verbosity(verbosity)
        if progress_bar_was_on:
            logging.enable_progress_bar()
    # transformers would go on with random weights in their place.
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        # Of a mismatch, the shapes follow the name.
        keys = (key if isinstance(key, str) else key[0] for key in report[fault])
        found = sorted(key for key in keys if key.startswith(tuple(f"{name}." for name in names)))
        if found:
            raise UserError(f"{checkpoint.path}: transformers reports {fault} {found[:3]}")
    return model.float().eval()


def _part_class(names: tuple[str, ...]) -> type[GptOssForCausalLM]:
    class Part(GptOssForCausalLM):
        def __init__(self, config: GptOssConfig) -> None:
            super().__init__(config)
            for name in (EMBEDDING, *map(_layer, range(config.num_hidden_layers)), NORM, HEAD):
                if name not in names:
                    self.set_submodule(name, _StandIn())

    return Part


class _StandIn(nn.Module):
    """Gives what it is given."""

    def forward(self, hidden: Tensor, **_: object) -> Tensor:
        return hidden
