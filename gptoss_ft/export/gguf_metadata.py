"""The keys and values at the head of a gpt-oss GGUF file: sizes, rotary embedding, tokenizer and chat template."""

import json
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_VERSION, GGUFType, GGUFWriter, LlamaFileType, RopeScalingType, SpecialVocab, TokenType

from gptoss_ft.errors import UserError
from gptoss_ft.harmony.vocabulary import PATTERN
from gptoss_ft.model.spec import GptOssSpec

# llama.cpp knows ways of splitting text by name; this one is of o200k, whose splits o200k_harmony has.
PRE_TOKENIZER = "gpt-4o"


def add_metadata(writer: GGUFWriter, spec: GptOssSpec, tokenizer: Path) -> None:
    """Give `writer` everything that comes before the tensors.

    Args:
        tokenizer: folder of the tokenizer files; without a tokenizer.json the file says that it has no tokenizer.

    Raises:
        UserError: if the tokenizer is none that llama.cpp can be told of.
    """
    writer.add_type(GGUFType.MODEL)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_file_type(LlamaFileType.MOSTLY_MXFP4_MOE)
    _add_sizes(writer, spec)
    if (tokenizer / "tokenizer.json").is_file():
        _add_tokenizer(writer, spec, tokenizer)
    else:
        writer.add_tokenizer_model("none")
        writer.add_vocab_size(spec.vocab_size)


def _add_sizes(writer: GGUFWriter, spec: GptOssSpec) -> None:
    writer.add_block_count(spec.num_hidden_layers)
    writer.add_context_length(spec.max_position_embeddings)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_feed_forward_length(spec.intermediate_size)
    writer.add_expert_feed_forward_length(spec.intermediate_size)
    writer.add_expert_count(spec.num_local_experts)
    writer.add_expert_used_count(spec.num_experts_per_tok)
    writer.add_head_count(spec.num_attention_heads)
    writer.add_head_count_kv(spec.num_key_value_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_sliding_window(spec.sliding_window)
    writer.add_layer_norm_rms_eps(spec.rms_norm_eps)
    writer.add_rope_freq_base(spec.rope_theta)
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(spec.rope_factor)
    writer.add_rope_scaling_orig_ctx_len(spec.initial_context_length)
    writer.add_rope_scaling_yarn_beta_fast(spec.rope_beta_fast)
    writer.add_rope_scaling_yarn_beta_slow(spec.rope_beta_slow)


def _add_tokenizer(writer: GGUFWriter, spec: GptOssSpec, folder: Path) -> None:
    file = folder / "tokenizer.json"
    content = json.loads(file.read_bytes())
    if _split_patterns(content) != [PATTERN]:
        raise UserError(
            "tokenizer.json of the base does not split text as o200k_harmony does, and llama.cpp has no name for how "
            "it does: use the published tokenizer files"
        )
    tokens, types = _token_table(content, spec.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_TOKENIZER)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    # A rendered conversation has all its control tokens.
    writer.add_add_bos_token(False)
    SpecialVocab(folder, load_merges=True, n_vocab=spec.vocab_size).add_to_gguf(writer, quiet=True)


def _split_patterns(content: dict[str, Any]) -> list[str]:
    pre_tokenizer = content.get("pre_tokenizer") or {}
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    return [step["pattern"].get("Regex") for step in steps if "pattern" in step]


def _token_table(content: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """The text and type of every id, in the order of ids; those without a token are there to fill the embedding."""
    tokens = [f"[PAD{id_}]" for id_ in range(vocab_size)]
    types = [int(TokenType.UNUSED)] * vocab_size
    added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    for text, id_ in (content["model"]["vocab"] | added).items():
        if id_ >= vocab_size:
            raise UserError(f"tokenizer.json of the base has a token {id_}, beyond its vocabulary of {vocab_size}")
        tokens[id_] = text
        types[id_] = int(TokenType.CONTROL if text in added else TokenType.NORMAL)
    return tokens, types
