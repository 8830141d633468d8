"""The o200k_harmony vocabulary, restored from the package's own files: no network, no cache folder.

Format: https://github.com/openai/harmony; ranks: OpenAI's o200k_base (MIT, see assets/LICENSE-tiktoken).
"""

import base64
import hashlib
import lzma
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.resources import files
from itertools import accumulate, pairwise

import tiktoken

from gptoss_ft.errors import UserError

RANKS_SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
NUM_RANKS = 199_998

# Splits text into the pieces that byte-pair merges never cross.
PATTERN = "|".join(
    [
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""\p{N}{1,3}""",
        r""" ?[^\s\p{L}\p{N}]+[\r\n/]*""",
        r"""\s*[\r\n]+""",
        r"""\s+(?!\S)""",
        r"""\s+""",
    ]
)

START_OF_TEXT, END_OF_TEXT = 199998, 199999
RETURN, CONSTRAIN, CHANNEL, START, END, MESSAGE, CALL = 200002, 200003, 200005, 200006, 200007, 200008, 200012

_NAMED = {
    START_OF_TEXT: "<|startoftext|>",
    END_OF_TEXT: "<|endoftext|>",
    RETURN: "<|return|>",
    CONSTRAIN: "<|constrain|>",
    CHANNEL: "<|channel|>",
    START: "<|start|>",
    END: "<|end|>",
    MESSAGE: "<|message|>",
    CALL: "<|call|>",
    200018: "<|endofprompt|>",
}
# Named as in the published tokenizer_config.json; openai-harmony calls the last one `<|reserved_200018|>`.
SPECIAL_TOKENS: dict[str, int] = {_NAMED.get(id_, f"<|reserved_{id_}|>"): id_ for id_ in range(199998, 200019)}


@cache
def ranks_file_bytes() -> bytes:
    """The published `o200k_base.tiktoken`: a line `base64(token) rank` for each of the 199,998 ranks.

    Raises:
        UserError: if the packaged copy is damaged.
    """
    lines = (b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(_packaged_tokens()))
    content = b"".join(lines)
    if hashlib.sha256(content).hexdigest() != RANKS_SHA256:
        raise _damaged()
    return content


def encode(text: str) -> list[int]:
    """Token ids of ordinary text; a control token spelled out in `text` stays text and cannot act as one."""
    return _encoding().encode_ordinary(text)


def decode(ids: Sequence[int]) -> str:
    """Text of token ids, control tokens by name; bytes that are not UTF-8 become U+FFFD."""
    return _encoding().decode(ids)


def token_bytes(id_: int) -> bytes:
    """What one token stands for, a control token for its name.

    Raises:
        KeyError: if no token has this id.
    """
    return _encoding().decode_single_token_bytes(id_)


@cache
def _encoding() -> tiktoken.Encoding:
    lines = (line.split() for line in ranks_file_bytes().splitlines())
    return tiktoken.Encoding(
        name="o200k_harmony",
        pat_str=PATTERN,
        mergeable_ranks={base64.b64decode(token): int(rank) for token, rank in lines},
        special_tokens=SPECIAL_TOKENS,
    )


def _packaged_tokens() -> Iterable[bytes]:
    """Tokens in rank order. The file is xz of one length byte per token, then all tokens end to end."""
    try:
        packed = lzma.decompress((files("gptoss_ft") / "assets" / "o200k_base.ranks.xz").read_bytes())
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise _damaged() from error
    bounds = accumulate(packed[:NUM_RANKS], initial=NUM_RANKS)
    return (packed[start:stop] for start, stop in pairwise(bounds))


def _damaged() -> UserError:
    return UserError(
        "gptoss_ft/assets/o200k_base.ranks.xz is missing or damaged (its ranks do not have the published sha256): "
        "install gptoss-ft again"
    )
