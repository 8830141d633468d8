"""The small files of the openai/gpt-oss-20b repository, rebuilt byte for byte from the packaged vocabulary."""

import base64
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from gptoss_ft.harmony.vocabulary import PATTERN, SPECIAL_TOKENS, ranks_file_bytes

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)

ROLES = {"bos_token": "<|startoftext|>", "eos_token": "<|return|>", "pad_token": "<|endoftext|>"}

TOKENIZER_CONFIG: dict[str, Any] = {
    "added_tokens_decoder": {
        str(token_id): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for token, token_id in SPECIAL_TOKENS.items()
    },
    "bos_token": ROLES["bos_token"],
    "clean_up_tokenization_spaces": False,
    "eos_token": ROLES["eos_token"],
    "extra_special_tokens": {},
    "model_input_names": ["input_ids", "attention_mask"],
    "model_max_length": int(1e30),
    "pad_token": ROLES["pad_token"],
    "tokenizer_class": "PreTrainedTokenizerFast",
}

GENERATION_CONFIG = {
    "bos_token_id": SPECIAL_TOKENS["<|startoftext|>"],
    "do_sample": True,
    "eos_token_id": [SPECIAL_TOKENS[token] for token in ("<|return|>", "<|endoftext|>", "<|call|>")],
    "pad_token_id": SPECIAL_TOKENS["<|endoftext|>"],
    "transformers_version": "4.55.0.dev0",
}


def write_tokenizer_files(folder: Path) -> None:
    """Write `TOKENIZER_FILES` to `folder`; takes about 3 s and 0.4 GB, nearly all of it for tokenizer.json."""
    build_tokenizer().save(str(folder / "tokenizer.json"))
    for name, content in (
        ("tokenizer_config.json", TOKENIZER_CONFIG),
        ("special_tokens_map.json", ROLES),
        ("generation_config.json", GENERATION_CONFIG),
    ):
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")
    template = files("gptoss_ft") / "assets" / "chat_template.jinja"
    (folder / "chat_template.jinja").write_bytes(template.read_bytes())


def build_tokenizer() -> Tokenizer:
    """The gpt-oss tokenizer, converted from the ranks by transformers."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    class FromPackagedRanks(TikTokenConverter):
        # tiktoken's own reader leaves a copy of every file it reads in a cache folder, keyed by path.
        @staticmethod
        def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
            lines = (line.split() for line in ranks_file_bytes().splitlines())
            return {base64.b64decode(token): int(rank) for token, rank in lines}

    return FromPackagedRanks(pattern=PATTERN, extra_special_tokens=list(SPECIAL_TOKENS)).converted()
