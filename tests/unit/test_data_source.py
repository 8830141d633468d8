import pytest

from gptoss_ft.data.source import read_rows
from gptoss_ft.errors import UserError


def test_rows_keep_their_line_numbers(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes('\ufeff{"a": 1}\n\n  \r\n{"a": "é"}\r\n{"a": 3}'.encode())
    assert list(read_rows(path)) == [(1, {"a": 1}), (4, {"a": "é"}), (5, {"a": 3})]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"rows\.jsonl: the file is empty"),
        (b"\n \n", r"rows\.jsonl: the file is empty"),
        (b'{"a": 1}\n{"a": \n', r"rows\.jsonl:2: not JSON \(Expecting value at column"),
        (b'{"a": 1}\n[1]\n', r"rows\.jsonl:2: a row must be a JSON object, not list"),
        (b'{"a": 1}\n\n{"a": "\xff"}\n', r"rows\.jsonl:3: byte 8 is not UTF-8"),
        (b'{"a": NaN}\n', r"rows\.jsonl:1: NaN is not JSON"),
        (b'{"a": 1}\n' + b"[" * 100_000 + b"\n", r"rows\.jsonl:2: lists and objects are nested too deeply"),
        (b'{"a": 1' + b"0" * 5000 + b"}\n", r"rows\.jsonl:1: a number of 5001 digits is too large"),
        (b'{"a": [-1e999]}\n', r"rows\.jsonl:1: the number -1e999 is too large"),
    ],
)
def test_errors_name_file_and_line(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_rows(path))


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        list(read_rows(tmp_path / "absent.jsonl"))
    with pytest.raises(UserError, match="the folder holds no row file"):
        list(read_rows(tmp_path))
