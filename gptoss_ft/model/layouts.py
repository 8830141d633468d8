"""Tensor names of the Hugging Face and the original gpt-oss checkpoints, as one table; its inverse is derived."""

import re

LAYER_HF, LAYER_ORIGINAL = "model.layers.{}.", "block.{}."

# The only tensors that the two layouts store differently: q, k and v are stacked, in this order, along the rows.
STACKED_QKV = ("q_proj", "k_proj", "v_proj")

OUTER_HF_TO_ORIGINAL = {
    "model.embed_tokens.weight": "embedding.weight",
    "model.norm.weight": "norm.scale",
    "lm_head.weight": "unembedding.weight",
}

LAYER_HF_TO_ORIGINAL = {
    "input_layernorm.weight": "attn.norm.scale",
    **{f"self_attn.{part}.weight": "attn.qkv.weight" for part in STACKED_QKV},
    **{f"self_attn.{part}.bias": "attn.qkv.bias" for part in STACKED_QKV},
    "self_attn.o_proj.weight": "attn.out.weight",
    "self_attn.o_proj.bias": "attn.out.bias",
    "self_attn.sinks": "attn.sinks",
    "post_attention_layernorm.weight": "mlp.norm.scale",
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.router.bias": "mlp.gate.bias",
    "mlp.experts.gate_up_proj_blocks": "mlp.mlp1_weight.blocks",
    "mlp.experts.gate_up_proj_scales": "mlp.mlp1_weight.scales",
    "mlp.experts.gate_up_proj_bias": "mlp.mlp1_bias",
    "mlp.experts.down_proj_blocks": "mlp.mlp2_weight.blocks",
    "mlp.experts.down_proj_scales": "mlp.mlp2_weight.scales",
    "mlp.experts.down_proj_bias": "mlp.mlp2_bias",
}


def _inverse(table: dict[str, str]) -> dict[str, tuple[str, ...]]:
    inverse: dict[str, tuple[str, ...]] = {}
    for hf_name, original in table.items():
        inverse[original] = (*inverse.get(original, ()), hf_name)
    return inverse


OUTER_ORIGINAL_TO_HF = _inverse(OUTER_HF_TO_ORIGINAL)
LAYER_ORIGINAL_TO_HF = _inverse(LAYER_HF_TO_ORIGINAL)


def to_original(hf_name: str) -> str:
    """The original name of an HF MXFP4 tensor; q, k and v share one.

    Raises:
        KeyError: if no gpt-oss tensor has this name.
    """
    if hf_name in OUTER_HF_TO_ORIGINAL:
        return OUTER_HF_TO_ORIGINAL[hf_name]
    layer, name = _split_layer(hf_name, LAYER_HF)
    if name not in LAYER_HF_TO_ORIGINAL:
        raise KeyError(f"{hf_name} is no tensor of the HF MXFP4 layout")
    return LAYER_ORIGINAL.format(layer) + LAYER_HF_TO_ORIGINAL[name]


def to_hf(original_name: str) -> tuple[str, ...]:
    """The HF names of an original tensor: one, or three that its rows hold one after another.

    Raises:
        KeyError: if no gpt-oss tensor has this name.
    """
    if original_name in OUTER_ORIGINAL_TO_HF:
        return OUTER_ORIGINAL_TO_HF[original_name]
    layer, name = _split_layer(original_name, LAYER_ORIGINAL)
    if name not in LAYER_ORIGINAL_TO_HF:
        raise KeyError(f"{original_name} is no tensor of the original layout")
    return tuple(LAYER_HF.format(layer) + hf_name for hf_name in LAYER_ORIGINAL_TO_HF[name])


def stacked_part(hf_name: str) -> str | None:
    """`q_proj`, `k_proj` or `v_proj` if the original layout stacks this tensor, else None."""
    return next((part for part in STACKED_QKV if f".self_attn.{part}." in hf_name), None)


def _split_layer(name: str, template: str) -> tuple[str, str]:
    match = re.fullmatch(template.replace(".", r"\.").replace("{}", r"(\d+)") + "(.+)", name)
    return (match[1], match[2]) if match else ("", "")
