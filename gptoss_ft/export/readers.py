"""Open checkpoints and adapters with programs that are not ours, for comparison with the trained model.

A reader takes one sequence and returns fp32 logits at chosen positions. Weights stay as their file holds them, and
each decoder layer is widened to fp32 only while it runs: every bf16 or MXFP4 value is an fp32 value, so what remains
between two readers of one file is the order of their sums.

T tokens · P chosen positions · V vocabulary
"""

import math
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import psutil
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import GptOssForCausalLM, Mxfp4Config
from transformers.utils import logging

from gptoss_ft.errors import UserError
from gptoss_ft.export.adapter import write_as_peft
from gptoss_ft.export.sglang_adapter import read_adapter_sglang
from gptoss_ft.files import GB
from gptoss_ft.model import layouts
from gptoss_ft.model.checkpoint import Checkpoint
from gptoss_ft.model.load import load_base

Reader = Callable[[Tensor, Tensor], Tensor]
"""`(input_ids_T, positions_P) -> logits_PV`"""

# It declares Python 3.12 and a server's dependencies; the model needs neither.
INSTALL_GPT_OSS = "pip install --no-deps --ignore-requires-python gpt-oss==0.0.9"
# The reference implementation gathers the weights of each token's experts; this many bytes of them at once.
GATHERED_BYTES = 1 << 28


class NotRun(Exception):
    """A reader cannot open this here; the message says why and, if it can be mended, how."""


def open_with_transformers(folder: Path) -> Reader:
    """transformers' own `from_pretrained`, with its own decoding of MXFP4.

    Raises:
        NotRun: if the folder is in the original layout or the memory does not suffice.
        UserError: if transformers finds tensors missing or superfluous.
    """
    return transformers_reader(_load_stock(folder))


def open_with_gptoss_ft(folder: Path) -> Reader:
    """Our own `load_base`.

    Raises:
        NotRun: if the memory does not suffice.
    """
    return transformers_reader(load_in_fp32(Checkpoint.open(folder)))


def load_in_fp32(checkpoint: Checkpoint) -> GptOssForCausalLM:
    """The model with everything but packed experts in fp32.

    Raises:
        NotRun: if the memory does not suffice for dense experts.
    """
    dense = checkpoint.layout == "bf16"
    if dense:
        _require_memory(4 * checkpoint.spec.num_parameters())
    return load_base(checkpoint.path, precision="bf16" if dense else "mxfp4", dtype=torch.float32)


def open_with_peft(base: Path, adapter: Path) -> Reader:
    """Stock PEFT's `PeftModel.from_pretrained` on transformers' dense model of the base.

    A base in the original layout, which transformers does not read, is put into its model class by `load_base`.

    Raises:
        NotRun: if the memory does not suffice.
    """
    checkpoint = Checkpoint.open(base)
    if checkpoint.layout == "original":
        _check_memory(checkpoint)
        dense = load_base(base, precision="bf16")
    else:
        dense = _load_stock(base)
    return transformers_reader(PeftModel.from_pretrained(dense, str(adapter)).eval())


def open_sglang_adapter_with_peft(base: Path, export: Path) -> Reader:
    """Stock PEFT on the factors of an adapter for SGLang, brought into PEFT's layout in a temporary folder.

    Raises:
        NotRun: if the memory does not suffice.
    """
    with TemporaryDirectory() as folder:
        write_as_peft(read_adapter_sglang(export, Checkpoint.open(base).spec), Path(folder))
        return open_with_peft(base, Path(folder))


def open_with_gpt_oss(folder: Path) -> Reader:
    """OpenAI's reference implementation, reading a folder in HF names or its own through its own `Checkpoint`.

    Raises:
        NotRun: if it is not installed or the memory does not suffice.
    """
    checkpoint = Checkpoint.open(folder)
    reference, weights = _import_gpt_oss("model"), _import_gpt_oss("weights")
    _check_memory(checkpoint)
    model = reference.Transformer(reference.ModelConfig(**checkpoint.spec.original_config()), torch.device("cpu"))
    source = (
        weights.Checkpoint(str(folder), torch.device("cpu"))
        if checkpoint.layout == "original"
        else _original_names(weights.Checkpoint)(checkpoint)
    )
    for name, parameter in model.named_parameters():
        parameter.data.copy_(source.get(name))
    expert_bytes = 4 * sum(map(math.prod, checkpoint.spec.expert_shapes().values()))
    tokens = max(1, GATHERED_BYTES // (expert_bytes * checkpoint.spec.num_experts_per_tok))
    for block in model.block:
        block.mlp = _InPieces(block.mlp, tokens)
    _widen_while_running(model.block)
    model.embedding.float(), model.norm.float(), model.unembedding.float()

    def read(input_ids_T: Tensor, positions_P: Tensor) -> Tensor:
        # The model has no choice of positions, and logits for all of a long sequence would be gigabytes.
        handle = model.unembedding.register_forward_pre_hook(lambda _module, args: args[0][positions_P])
        with handle, torch.no_grad():
            return model(input_ids_T)

    return read


def transformers_reader(model: GptOssForCausalLM | PeftModel) -> Reader:
    """A model that is loaded already, widened to fp32 layer by layer."""
    core = model.get_base_model() if isinstance(model, PeftModel) else model
    _widen_while_running(core.model.layers)
    core.model.embed_tokens.float(), core.model.norm.float(), core.lm_head.float()

    def read(input_ids_T: Tensor, positions_P: Tensor) -> Tensor:
        with torch.no_grad():
            return model(input_ids=input_ids_T[None], logits_to_keep=positions_P, use_cache=False).logits[0]

    return read


def _load_stock(folder: Path) -> GptOssForCausalLM:
    checkpoint = Checkpoint.open(folder)
    if checkpoint.layout == "original":
        raise NotRun("transformers does not read the original layout")
    _check_memory(checkpoint)
    options = {"quantization_config": Mxfp4Config(dequantize=True)} if checkpoint.layout == "mxfp4" else {}
    verbosity, progress_bar_was_on = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        model, report = GptOssForCausalLM.from_pretrained(
            folder,
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
        if report[fault]:
            raise UserError(f"{folder}: transformers reports {fault} {sorted(map(str, report[fault]))[:3]}")
    return model.eval()


def _check_memory(checkpoint: Checkpoint) -> None:
    spec = checkpoint.spec
    # The dense bf16 model, embedding and head widened, and a layer in fp32 twice: with and without an adapter added.
    outer = 2 * spec.vocab_size * spec.hidden_size
    layer = (spec.num_parameters() - outer) // spec.num_hidden_layers
    _require_memory(2 * spec.num_parameters() + 2 * outer + 2 * 4 * layer)


def _require_memory(needed: int) -> None:
    available = psutil.virtual_memory().available
    if needed > available:
        raise NotRun(
            f"it needs {needed / GB:.1f} GB of memory and {available / GB:.1f} GB are free: "
            "verify on a machine with more"
        )


def _widen_while_running(blocks: Iterable[nn.Module]) -> None:
    for block in blocks:
        narrow = [parameter for parameter in block.parameters() if parameter.dtype == torch.bfloat16]
        block.register_forward_pre_hook(_casting(narrow, torch.float32))
        block.register_forward_hook(_casting(narrow, torch.bfloat16))


def _casting(parameters: list[nn.Parameter], dtype: torch.dtype) -> Callable[..., None]:
    def cast(*_: object) -> None:
        for parameter in parameters:
            parameter.data = parameter.data.to(dtype)

    return cast


class _InPieces(nn.Module):
    """A layer that treats tokens one by one, run on a few at a time."""

    def __init__(self, layer: nn.Module, tokens: int) -> None:
        super().__init__()
        self.layer = layer
        self.tokens = tokens

    def forward(self, x_TH: Tensor) -> Tensor:
        return torch.cat([self.layer(piece) for piece in x_TH.split(self.tokens)])


def _import_gpt_oss(part: str) -> ModuleType:
    try:
        return import_module(f"gpt_oss.torch.{part}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "gpt_oss":
            raise
        raise NotRun(f"the gpt-oss package is not installed: {INSTALL_GPT_OSS}") from error


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
