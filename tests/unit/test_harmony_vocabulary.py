import hashlib
import lzma
import socket
from importlib.resources import files

import pytest

from gptoss_ft.errors import UserError
from gptoss_ft.harmony import vocabulary


def test_ranks_file_is_the_published_one():
    content = vocabulary.ranks_file_bytes()
    assert len(content) == 3_613_922
    assert hashlib.sha256(content).hexdigest() == "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"


def test_published_ids():
    assert vocabulary.encode("Hello, world!") == [13225, 11, 2375, 0]
    assert list(vocabulary.SPECIAL_TOKENS.values()) == list(range(199998, 200019))
    named = {name: id_ for name, id_ in vocabulary.SPECIAL_TOKENS.items() if "reserved" not in name}
    assert named == {
        "<|startoftext|>": 199998,
        "<|endoftext|>": 199999,
        "<|return|>": 200002,
        "<|constrain|>": 200003,
        "<|channel|>": 200005,
        "<|start|>": 200006,
        "<|end|>": 200007,
        "<|message|>": 200008,
        "<|call|>": 200012,
        "<|endofprompt|>": 200018,
    }


def test_control_tokens_in_text_stay_text():
    text = "".join(vocabulary.SPECIAL_TOKENS) + " ordinary"
    ids = vocabulary.encode(text)
    assert max(ids) < min(vocabulary.SPECIAL_TOKENS.values())
    assert vocabulary.decode(ids) == text
    assert vocabulary.decode([vocabulary.START, *vocabulary.encode("user")]) == "<|start|>user"


def test_bytes_of_single_tokens():
    ids = vocabulary.encode("naïve 🤗 text")
    assert b"".join(map(vocabulary.token_bytes, ids)).decode() == "naïve 🤗 text"
    assert vocabulary.token_bytes(vocabulary.CALL) == b"<|call|>"
    with pytest.raises(KeyError):
        vocabulary.token_bytes(201_000)


def test_needs_no_network(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("the vocabulary opened a socket")

    monkeypatch.setattr(socket, "socket", refuse)
    vocabulary._encoding.cache_clear()
    vocabulary.ranks_file_bytes.cache_clear()
    assert vocabulary.encode("a b") == [64, 287]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1000],
        lambda content: b"not xz at all",
        lambda content: lzma.compress(lzma.decompress(content).replace(b"the", b"eht", 1), preset=0),
    ],
    ids=["truncated", "another file", "one token changed"],
)
def test_damaged_ranks_are_refused(damage, monkeypatch, tmp_path):
    good = (files("gptoss_ft") / "assets" / "o200k_base.ranks.xz").read_bytes()
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "o200k_base.ranks.xz").write_bytes(damage(good))
    monkeypatch.setattr(vocabulary, "files", lambda package: tmp_path)
    vocabulary.ranks_file_bytes.cache_clear()
    with pytest.raises(UserError, match=r"ranks\.xz is missing or damaged.*install"):
        vocabulary.ranks_file_bytes()
