"""The tokenizer files equal those of openai/gpt-oss-20b (revision 6cee5e81), byte for byte."""

import hashlib

import pytest

from gptoss_ft.model.tokenizer import TOKENIZER_FILES, write_tokenizer_files

PUBLISHED_SHA256 = {
    "tokenizer.json": "0614fe83cadab421296e664e1f48f4261fa8fef6e03e63bb75c20f38e37d07d3",
    "tokenizer_config.json": "9279e942392b742d633c7adbb89ebe002c98399db8926a7af5125c726f404070",
    "special_tokens_map.json": "dd5e191d20c12d2fee1da5bae14ca1db0f5f4215300af691f23cdee97120a293",
    "generation_config.json": "f9970ada892d2d1f72e3ed0a6535ccebadd11897318794ca671d8c7014c957da",
    "chat_template.jinja": "a4c9919cbbd4acdd51ccffe22da049264b1b73e59055fa58811a99efbd7c8146",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer_files(folder)
    return folder


@pytest.mark.parametrize("name", TOKENIZER_FILES)
def test_file_is_the_published_one(folder, name):
    assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == PUBLISHED_SHA256[name]


def test_nothing_else_is_written(folder):
    assert {path.name for path in folder.iterdir()} == set(PUBLISHED_SHA256)


def test_transformers_loads_it_with_the_harmony_ids(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (199998, 200002, 199999)
    assert tokenizer.convert_tokens_to_ids(["<|channel|>", "<|start|>", "<|end|>", "<|message|>", "<|call|>"]) == [
        200005,
        200006,
        200007,
        200008,
        200012,
    ]
