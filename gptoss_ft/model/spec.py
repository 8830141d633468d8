"""What a gpt-oss checkpoint holds: its sizes, its two config.json forms, and every tensor's name, type and shape."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch

from gptoss_ft.errors import UserError
from gptoss_ft.model import layouts

Layout = Literal["mxfp4", "bf16", "original"]

QUANTIZATION_CONFIG = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
    "quant_method": "mxfp4",
}

# The parts of the HF config that the architecture fixes: other values describe another model.
FIXED_HF_VALUES = {
    "model_type": "gpt_oss",
    "attention_bias": True,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}

HF_SIZES = (
    "num_hidden_layers",
    "num_local_experts",
    "num_experts_per_tok",
    "hidden_size",
    "intermediate_size",
    "head_dim",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "sliding_window",
)


@dataclass(frozen=True)
class TensorSpec:
    """A tensor as a file declares it."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class GptOssSpec:
    """The sizes of a gpt-oss model, under the names of the HF config; YaRN's are prefixed `rope_`."""

    num_hidden_layers: int
    num_local_experts: int
    num_experts_per_tok: int = 4
    hidden_size: int = 2880
    intermediate_size: int = 2880
    head_dim: int = 64
    num_attention_heads: int = 64
    num_key_value_heads: int = 8
    vocab_size: int = 201088
    sliding_window: int = 128
    swiglu_limit: float = 7.0
    rms_norm_eps: float = 1e-5
    initial_context_length: int = 4096
    max_position_embeddings: int = 131072
    rope_theta: float = 150000
    rope_factor: float = 32.0
    rope_beta_fast: float = 32.0
    rope_beta_slow: float = 1.0
    eos_token_id: int = 200002
    pad_token_id: int = 199999

    def __post_init__(self) -> None:
        for name in HF_SIZES:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"{name} must be a positive integer, not {value!r}")
        for name in ("hidden_size", "intermediate_size"):
            if getattr(self, name) % 32:
                raise UserError(f"{name}={getattr(self, name)} is not a multiple of 32, the size of an MXFP4 block")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.num_experts_per_tok > self.num_local_experts:
            raise UserError(
                f"num_experts_per_tok={self.num_experts_per_tok} exceeds num_local_experts={self.num_local_experts}"
            )

    @property
    def layer_types(self) -> list[str]:
        """Even layers attend within the sliding window, odd ones to everything."""
        return [("sliding_attention", "full_attention")[layer % 2] for layer in range(self.num_hidden_layers)]

    def tensors(self, layout: Layout = "mxfp4") -> dict[str, TensorSpec]:
        """Every tensor of a checkpoint in `layout`, by name, in model order."""
        tensors = {**self._layer_tensors(layout), **self._outer_tensors()}
        if layout != "original":
            return tensors
        merged: dict[str, TensorSpec] = {}
        for name, tensor in tensors.items():
            original, before = layouts.to_original(name), merged.get(layouts.to_original(name))
            rows = tensor.shape[0] + (before.shape[0] if before else 0)
            merged[original] = TensorSpec(tensor.dtype, (rows, *tensor.shape[1:]))
        return merged

    def qkv_rows(self) -> dict[str, slice]:
        """Where the original layout's stacked qkv tensors hold the rows of each projection."""
        query, key_value = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return {
            "q_proj": slice(0, query),
            "k_proj": slice(query, query + key_value),
            "v_proj": slice(query + key_value, query + 2 * key_value),
        }

    def expert_shapes(self) -> dict[str, tuple[int, int]]:
        """The (out, in) sizes of one expert's two projections; gate_up's rows alternate gate and up."""
        return {
            "gate_up_proj": (2 * self.intermediate_size, self.hidden_size),
            "down_proj": (self.hidden_size, self.intermediate_size),
        }

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """The (out, in) sizes of the linear layers outside the experts, by their name within a decoder layer."""
        hidden = self.hidden_size
        rows = {name: where.stop - where.start for name, where in self.qkv_rows().items()}
        return {
            **{f"self_attn.{name}": (count, hidden) for name, count in rows.items()},
            "self_attn.o_proj": (hidden, rows["q_proj"]),
            "mlp.router": (self.num_local_experts, hidden),
        }

    def num_parameters(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in self.tensors("bf16").values())

    def num_bytes(self, layout: Layout = "mxfp4") -> int:
        return sum(tensor.nbytes for tensor in self.tensors(layout).values())

    def hf_config(self) -> dict[str, Any]:
        """config.json of the HF MXFP4 layout, keys and their order as published."""
        return {
            "architectures": ["GptOssForCausalLM"],
            "attention_bias": True,
            "attention_dropout": 0.0,
            "eos_token_id": self.eos_token_id,
            "experts_per_token": self.num_experts_per_tok,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initial_context_length": self.initial_context_length,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate_size,
            "layer_types": self.layer_types,
            "max_position_embeddings": self.max_position_embeddings,
            "model_type": "gpt_oss",
            "num_attention_heads": self.num_attention_heads,
            "num_experts_per_tok": self.num_experts_per_tok,
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": self.num_key_value_heads,
            "num_local_experts": self.num_local_experts,
            "output_router_logits": False,
            "pad_token_id": self.pad_token_id,
            "quantization_config": QUANTIZATION_CONFIG,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_scaling": {
                "beta_fast": self.rope_beta_fast,
                "beta_slow": self.rope_beta_slow,
                "factor": self.rope_factor,
                "original_max_position_embeddings": self.initial_context_length,
                "rope_type": "yarn",
                "truncate": False,
            },
            "rope_theta": self.rope_theta,
            "router_aux_loss_coef": 0.9,
            "sliding_window": self.sliding_window,
            "swiglu_limit": self.swiglu_limit,
            "tie_word_embeddings": False,
            "transformers_version": "4.55.0.dev0",
            "use_cache": True,
            "vocab_size": self.vocab_size,
        }

    def original_config(self) -> dict[str, Any]:
        """config.json of the original layout; readers pass it to a dataclass, so nothing may be added."""
        return {key: getattr(self, name) for key, name in ORIGINAL_KEYS.items()}

    def config_text(self, layout: Layout) -> str:
        """The text of config.json in `layout`."""
        config = self.original_config() if layout == "original" else self.hf_config()
        if layout == "bf16":
            del config["quantization_config"]
        return config_as_text(config)

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any], where: str = "config.json") -> "GptOssSpec":
        """Read an HF config, as published or as transformers 5 rewrites it (`rope_parameters`).

        Raises:
            UserError: if a size is missing or a value belongs to another architecture; `where` names the file.
        """
        for key, wanted in FIXED_HF_VALUES.items():
            if config.get(key, wanted if key != "model_type" else None) != wanted:
                raise UserError(f"{where}: {key} is {config.get(key)!r}; only gpt-oss ({key}={wanted!r}) is supported")
        _require(HF_SIZES, config, where)
        rope = {**config.get("rope_scaling", {}), **config.get("rope_parameters", {})}
        theta = config.get("rope_theta", rope.get("rope_theta"))
        _require(("factor", "beta_fast", "beta_slow", "rope_type"), rope, f"{where}, rope_scaling")
        if rope["rope_type"] != "yarn" or rope.get("truncate") is not False or theta is None:
            raise UserError(f"{where}: gpt-oss needs rope_theta and rope_scaling of rope_type yarn with truncate false")
        plain = {field.name for field in fields(cls)} - {"rope_theta"}
        spec = cls(
            **{key: value for key, value in config.items() if key in plain},
            rope_theta=theta,
            rope_factor=rope["factor"],
            rope_beta_fast=rope["beta_fast"],
            rope_beta_slow=rope["beta_slow"],
        )
        if config.get("layer_types", spec.layer_types) != spec.layer_types:
            raise UserError(f"{where}: layer_types do not alternate sliding_attention and full_attention")
        return spec

    @classmethod
    def from_original_config(cls, config: Mapping[str, Any], where: str = "config.json") -> "GptOssSpec":
        """Read the original layout's config.

        Raises:
            UserError: if a key is missing or is none of this format's.
        """
        _require(ORIGINAL_KEYS, config, where)
        foreign = sorted(config.keys() - ORIGINAL_KEYS.keys())
        if foreign:
            raise UserError(f"{where}: {', '.join(foreign)} does not belong in an original gpt-oss config")
        sizes = {name: config[key] for key, name in ORIGINAL_KEYS.items()}
        sizes["max_position_embeddings"] = round(config["initial_context_length"] * config["rope_scaling_factor"])
        # This config has no special ids: they are harmony's, unless the vocabulary is too small to hold them.
        for name in ("eos_token_id", "pad_token_id"):
            sizes[name] = min(getattr(cls, name), config["vocab_size"] - 1)
        return cls(**sizes)

    def _outer_tensors(self) -> dict[str, TensorSpec]:
        def bf16(*shape: int) -> TensorSpec:
            return TensorSpec(torch.bfloat16, shape)

        embedding = bf16(self.vocab_size, self.hidden_size)
        return {
            "model.embed_tokens.weight": embedding,
            "model.norm.weight": bf16(self.hidden_size),
            "lm_head.weight": embedding,
        }

    def _layer_tensors(self, layout: Layout) -> dict[str, TensorSpec]:
        bf16, experts, hidden = torch.bfloat16, self.num_local_experts, self.hidden_size
        layer: dict[str, TensorSpec] = {}
        for name in ("input_layernorm", "post_attention_layernorm"):
            layer[f"{name}.weight"] = TensorSpec(bf16, (hidden,))
        for name, (rows, columns) in self.linear_shapes().items():
            layer[f"{name}.weight"] = TensorSpec(bf16, (rows, columns))
            layer[f"{name}.bias"] = TensorSpec(bf16, (rows,))
        layer["self_attn.sinks"] = TensorSpec(bf16, (self.num_attention_heads,))
        for name, (rows, columns) in self.expert_shapes().items():
            stem = f"mlp.experts.{name}"
            if layout == "bf16":
                layer[stem] = TensorSpec(bf16, (experts, columns, rows))
            else:
                layer[f"{stem}_blocks"] = TensorSpec(torch.uint8, (experts, rows, columns // 32, 16))
                layer[f"{stem}_scales"] = TensorSpec(torch.uint8, (experts, rows, columns // 32))
            layer[f"{stem}_bias"] = TensorSpec(bf16, (experts, rows))
        return {
            f"model.layers.{index}.{name}": tensor
            for index in range(self.num_hidden_layers)
            for name, tensor in layer.items()
        }


ORIGINAL_KEYS = {
    "num_hidden_layers": "num_hidden_layers",
    "num_experts": "num_local_experts",
    "experts_per_token": "num_experts_per_tok",
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "swiglu_limit": "swiglu_limit",
    "head_dim": "head_dim",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "sliding_window": "sliding_window",
    "initial_context_length": "initial_context_length",
    "rope_theta": "rope_theta",
    "rope_scaling_factor": "rope_factor",
    "rope_ntk_alpha": "rope_beta_slow",
    "rope_ntk_beta": "rope_beta_fast",
}

SPECS = {
    "tiny": GptOssSpec(
        num_hidden_layers=4,
        num_local_experts=8,
        hidden_size=128,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
    "gpt_oss_20b": GptOssSpec(num_hidden_layers=24, num_local_experts=32),
    "gpt_oss_120b": GptOssSpec(num_hidden_layers=36, num_local_experts=128),
}


def config_as_text(config: Mapping[str, Any]) -> str:
    """JSON as the published config.json is laid out."""
    return json.dumps(config, indent=2) + "\n"


def _require(keys: Any, config: Mapping[str, Any], where: str) -> None:
    missing = [key for key in keys if key not in config]
    if missing:
        raise UserError(f"{where}: {', '.join(missing)} missing; a gpt-oss checkpoint's config.json has it")
