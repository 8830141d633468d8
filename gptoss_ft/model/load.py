"""A checkpoint folder of any published layout as transformers' `GptOssForCausalLM`, experts packed or upcast."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from gptoss_ft.errors import UserError
from gptoss_ft.kernels.dispatch import dequantize_mxfp4
from gptoss_ft.model.attention import ATTENTION
from gptoss_ft.model.checkpoint import Checkpoint
from gptoss_ft.model.experts import PackedExperts
from gptoss_ft.model.few_rows_layer import use_few_rows_layers
from gptoss_ft.model.linear import use_frozen_linear

PACKED = "mxfp4_packed"


@register_quantization_config(PACKED)
class PackedMXFP4Config(QuantizationConfigMixin):
    """Names the quantizer below in a model's config; it has no settings."""

    def __init__(self, **_: Any) -> None:
        self.quant_method = PACKED


@register_quantizer(PACKED)
class PackedMXFP4Quantizer(HfQuantizer):
    """transformers' hook for weights in a format of their own: swaps in `PackedExperts` before anything is loaded.

    Its built-in `mxfp4` quantizer either dequantises the experts or repacks them for inference kernels, and
    declares them untrainable.
    """

    requires_calibration = False

    def _process_model_before_weight_loading(self, model: GptOssForCausalLM, **_: Any) -> None:
        for name, module in list(model.named_modules()):
            if isinstance(module, GptOssExperts):
                with torch.device("meta"):
                    model.set_submodule(name, PackedExperts(model.config))

    @property
    def is_trainable(self) -> bool:
        """Through the packed weights, for adapters beside them."""
        return True

    def is_serializable(self) -> bool:
        # transformers would write the in-memory names under this private method's name; exports have their own writer.
        return False


def load_base(
    path: Path | str,
    *,
    precision: str = "mxfp4",
    dtype: torch.dtype = torch.bfloat16,
    attn_implementation: str = ATTENTION,
    device: torch.device | str = "cpu",
) -> GptOssForCausalLM:
    """Load a base model, frozen and in evaluation mode.

    On a CPU every tensor whose dtype is kept stays a view of the mapped file, so packed experts take no private memory.

    Args:
        path: a folder in the Hugging Face MXFP4 or bf16 layout or the original OpenAI layout.
        precision: "mxfp4" keeps the experts packed, "bf16" holds them dense in `dtype`.
        dtype: of everything that is not packed.

    Raises:
        UserError: if the folder is not a whole gpt-oss checkpoint, naming the tensor at fault, or its experts are
            bf16 and cannot be kept packed.
    """
    checkpoint = Checkpoint.open(path)
    packed = precision == "mxfp4"
    if packed and checkpoint.layout == "bf16":
        raise UserError(
            f"{path} holds bf16 experts, so there is no MXFP4 to keep: "
            "set model.precision=bf16 or use the MXFP4 checkpoint"
        )
    config = dense_config(checkpoint)
    if packed:
        config.quantization_config = {"quant_method": PACKED}
    # One way in for all layouts: transformers takes the tensors by name and copies only what changes its dtype.
    progress_bar_was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = GptOssForCausalLM.from_pretrained(
            None,
            config=config,
            state_dict=state_dict(checkpoint, packed=packed, dtype=dtype),
            dtype=dtype,
            attn_implementation=attn_implementation,
        )
    finally:
        if progress_bar_was_on:
            logging.enable_progress_bar()
    model.requires_grad_(False)
    use_frozen_linear(model)
    use_few_rows_layers(model)
    model.config.use_cache = False
    # What PEFT records as the base of an adapter.
    model.name_or_path = str(path)
    return model.to(device).eval()


def dense_config(checkpoint: Checkpoint) -> GptOssConfig:
    """transformers' config of the model with bf16 experts."""
    return GptOssConfig.from_dict(
        {key: value for key, value in checkpoint.spec.hf_config().items() if key != "quantization_config"}
    )


def state_dict(
    checkpoint: Checkpoint, *, packed: bool, dtype: torch.dtype, modules: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """Tensors by the names in transformers' model: those of some modules, or all."""
    tensors = {}
    for name in checkpoint.names():
        if modules and not name.startswith(tuple(f"{module}." for module in modules)):
            continue
        if packed or not name.endswith(("_blocks", "_scales")):
            tensors[name] = checkpoint.tensor(name)
        elif name.endswith("_blocks"):
            weight = name.removesuffix("_blocks")
            tensors[weight] = _upcast(checkpoint.tensor(name), checkpoint.tensor(f"{weight}_scales"), dtype)
    return tensors


def _upcast(blocks_EOGB: Tensor, scales_EOG: Tensor, dtype: torch.dtype) -> Tensor:
    """Dense `[E, in, out]`, one expert decoded at a time so that the peak is the result."""
    num_experts, num_out, groups, half_block = blocks_EOGB.shape
    dense_EIO = torch.empty(num_experts, groups * half_block * 2, num_out, dtype=dtype)
    for expert in range(num_experts):
        dense_EIO[expert] = dequantize_mxfp4(blocks_EOGB[expert], scales_EOG[expert], dtype).T
    return dense_EIO
