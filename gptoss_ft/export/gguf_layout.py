"""What a gpt-oss GGUF file of llama.cpp holds: every tensor's name, type and shape, and its form of MXFP4.

Names are the `gguf` package's. gate_up is two tensors there, and blocks and scales are one: a block of 32 is its scale
byte and 16 bytes, of which byte i holds elements i and i + 16 (a checkpoint's holds 2·i and 2·i + 1).

Shapes: E experts · O out rows · G blocks of 32 columns.
"""

from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from gguf import (
    GGML_QUANT_SIZES,
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    TensorNameMap,
    dequantize,
    get_tensor_name_map,
    quantize,
)
from torch import Tensor

from gptoss_ft.errors import UserError
from gptoss_ft.kernels.codec import pack_nibbles, unpack_nibbles
from gptoss_ft.kernels.reference import BLOCK_SIZE
from gptoss_ft.model.spec import GptOssSpec

GgufFormat = Literal["gguf", "gguf_q8_0"]

ARCHITECTURE = MODEL_ARCH_NAMES[MODEL_ARCH.GPT_OSS]
MODEL_FILE, ADAPTER_FILE = "model.gguf", "adapter.gguf"
BLOCK_BYTES = 1 + BLOCK_SIZE // 2
# llama.cpp's code has these in place of settings.
FIXED = {"swiglu_limit": 7.0}

# The matrices outside the experts: as they are, or in 8 bits with a scale for every 32.
MATRIX_TYPES: dict[GgufFormat, GGMLQuantizationType] = {
    "gguf": GGMLQuantizationType.BF16,
    "gguf_q8_0": GGMLQuantizationType.Q8_0,
}


@dataclass(frozen=True)
class GgufTensor:
    """A tensor as a GGUF file declares it, in NumPy's order of dimensions (ggml's is the reverse)."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.type]
        return prod(self.shape) // block * size


def check_representable(spec: GptOssSpec) -> None:
    """Raise UserError, naming the field, if llama.cpp would run another model than this."""
    for name, value in FIXED.items():
        if getattr(spec, name) != value:
            raise UserError(
                f"{name} is {getattr(spec, name)}, and llama.cpp computes with {value} whatever the file says: "
                "export format=mxfp4 or bf16"
            )


def gguf_tensors(spec: GptOssSpec, format: GgufFormat) -> dict[str, tuple[GgufTensor, ...]]:
    """The tensors of a file by HF name in the bf16 layout, in model order: one each, of gate_up two."""
    names = get_tensor_name_map(MODEL_ARCH.GPT_OSS, spec.num_hidden_layers)
    tensors: dict[str, tuple[GgufTensor, ...]] = {}
    for hf_name, tensor in spec.tensors("bf16").items():
        is_stack = len(tensor.shape) == 3
        # The bf16 layout has expert weights [E, K, O].
        shape = (tensor.shape[0], tensor.shape[2], tensor.shape[1]) if is_stack else tensor.shape
        parts = _parts(hf_name)
        if len(parts) > 1:
            shape = (shape[0], shape[1] // len(parts), *shape[2:])
        type = GGMLQuantizationType.MXFP4 if is_stack else _dense_type(hf_name, shape, format)
        tensors[hf_name] = tuple(GgufTensor(_name(names, part), type, shape) for part in parts)
    return tensors


def q8_0_weights(spec: GptOssSpec, format: str) -> frozenset[str]:
    """HF names of what a file of this format, if it is a GGUF one, holds in ggml's 8 bits."""
    if format not in MATRIX_TYPES:
        return frozenset()
    tensors = gguf_tensors(spec, format)
    return frozenset(name for name, parts in tensors.items() if parts[0].type == GGMLQuantizationType.Q8_0)


def to_q8_0(values: Tensor) -> Tensor:
    """Numbers [..., K] as rows of ggml's 8-bit blocks, uint8 [..., K / 32 · 34]."""
    return torch.from_numpy(quantize(values.float().numpy(), GGMLQuantizationType.Q8_0))


def through_q8_0(values: Tensor) -> Tensor:
    """What remains of numbers [..., K] in ggml's 8-bit blocks, fp32."""
    return torch.from_numpy(dequantize(to_q8_0(values).numpy(), GGMLQuantizationType.Q8_0))


def to_ggml_blocks(blocks: Tensor, scales: Tensor) -> Tensor:
    """MXFP4 blocks [..., G, 16] and scales [..., G] as rows of ggml blocks [..., 17·G], bit for bit."""
    codes = unpack_nibbles(blocks)
    halves = torch.stack((codes[..., : BLOCK_SIZE // 2], codes[..., BLOCK_SIZE // 2 :]), dim=-1)
    return torch.cat((scales.unsqueeze(-1), pack_nibbles(halves.flatten(-2))), dim=-1).flatten(-2)


def from_ggml_blocks(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `to_ggml_blocks`."""
    groups = packed.unflatten(-1, (-1, BLOCK_BYTES))
    halves = unpack_nibbles(groups[..., 1:]).unflatten(-1, (-1, 2))
    # Kernels leave what is not contiguous to plain torch.
    return pack_nibbles(halves.transpose(-1, -2).flatten(-2)), groups[..., 0].contiguous()


def _name(names: TensorNameMap, part: str) -> str:
    name = names.get_name(part, try_suffixes=(".weight", ".bias"))
    if name is None:
        raise KeyError(f"the gguf package has no name for {part}")
    return name


def _parts(hf_name: str) -> list[str]:
    """What the `gguf` package calls an HF tensor, or its gate and its up."""
    if hf_name.endswith("sinks"):
        return [f"{hf_name}.weight"]
    stem, experts, projection = hf_name.partition(".experts.")
    if not experts:
        return [hf_name]
    suffix = ".bias" if projection.endswith("_bias") else ".weight"
    parts = ["gate_proj", "up_proj"] if projection.startswith("gate_up") else ["down_proj"]
    return [f"{stem}.experts.{part}{suffix}" for part in parts]


def _dense_type(hf_name: str, shape: tuple[int, ...], format: GgufFormat) -> GGMLQuantizationType:
    # llama.cpp adds biases, scales norms and routes in fp32, which every bf16 number is.
    if len(shape) == 1 or hf_name.endswith(("_bias", "router.weight")):
        return GGMLQuantizationType.F32
    return MATRIX_TYPES[format]
