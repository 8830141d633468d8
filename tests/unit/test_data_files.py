"""Rows come out of every kind of file alike, one at a time, and a damaged file or row is named."""

import gzip
import io
import json
import subprocess
import sys

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gptoss_ft.data.files import absolute, expand
from gptoss_ft.data.source import MAX_ROW_BYTES, parse_row, raw_rows, read_rows
from gptoss_ft.errors import UserError

ROWS = [{"prompt": "1 + 1?\n", "completion": "2"}, {"prompt": 'a "b", é', "completion": "4"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def zstd(content):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def parquet(rows):
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


FILES = {
    "rows.jsonl": LINES,
    "rows.ndjson": LINES,
    "rows.jsonl.gz": gzip.compress(LINES[:20]) + gzip.compress(LINES[20:]),
    "rows.jsonl.zst": zstd(LINES),
    "list.json": json.dumps(ROWS, indent=2).encode(),
    "bom.json": b"\xef\xbb\xbf" + json.dumps(ROWS).encode(),
    "lines.json": LINES,
    "objects.json": "\n".join(json.dumps(row, indent=1) for row in ROWS).encode(),
    "list.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "rows.parquet": parquet(ROWS),
    "rows.csv": '\ufeffprompt,completion\n"1 + 1?\n",2\n"a ""b"", é",4\n'.encode(),
    "rows.csv.zst": zstd(b'prompt,completion\n"1 + 1?\n",2\n' + '"a ""b"", é",4\n'.encode()),
}


@pytest.mark.parametrize("name", FILES)
def test_rows_are_the_same_from_every_kind_of_file(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    assert [row for _, row in read_rows(tmp_path / name)] == ROWS


@pytest.mark.parametrize("splits", [None, ["train", "test"]], ids=["table", "splits"])
def test_rows_of_a_datasets_folder(tmp_path, splits):
    table = datasets.Dataset.from_list(ROWS)
    saved = datasets.DatasetDict({name: table for name in splits}) if splits else table
    saved.save_to_disk(tmp_path / "table")
    assert [row for _, row in read_rows(tmp_path / "table")] == ROWS
    if splits:
        assert [row for _, row in read_rows(tmp_path / "table" / "test")] == ROWS


def test_splits_without_train_are_named(tmp_path):
    datasets.DatasetDict({"other": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "table")
    with pytest.raises(UserError, match="has no split `train`; name one of its folders: other"):
        list(read_rows(tmp_path / "table"))


def test_nulls_of_tables_are_absent_at_any_depth(tmp_path):
    rows = [{"a": {"x": 1, "y": None}, "b": [{"z": None, "w": "s"}]}, {"a": None, "b": None}]
    (tmp_path / "rows.parquet").write_bytes(parquet(rows))
    assert [row for _, row in read_rows(tmp_path / "rows.parquet")] == [{"a": {"x": 1}, "b": [{"w": "s"}]}, {}]


def test_a_hub_name_is_streamed(monkeypatch):
    asked = []

    def load_dataset(*names, **options):
        asked.append((names, options))
        return ROWS

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [row for _, row in read_rows("hf://owner/name")] == ROWS
    assert list(read_rows("hf://owner/name/config:test[:10]"))
    assert asked == [
        (("owner/name", None), {"split": "train", "streaming": True}),
        (("owner/name", "config"), {"split": "test[:10]", "streaming": True}),
    ]
    with pytest.raises(UserError, match="a hub data set is named hf://owner/name"):
        list(read_rows("hf://name"))


def test_a_hub_that_cannot_be_reached_is_named():
    with pytest.raises(UserError, match=r"hf://no/such: cannot be read from the hub \(.*\); check name"):
        list(read_rows("hf://no/such"))


def test_globs_and_folders_are_sorted_files(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.parquet.x", "notes.txt", "deep/d.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(LINES)
    files = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    assert expand([tmp_path / "*.jsonl"]) == files
    assert expand([tmp_path / "**" / "*.jsonl"]) == [*files, str(tmp_path / "deep" / "d.jsonl")]
    assert expand([tmp_path])[:2] == files
    with pytest.raises(UserError, match="no file matches"):
        expand([tmp_path / "*.json"])
    assert absolute("hf://a/b") == "hf://a/b" and absolute("x").endswith("/x")


DAMAGED = {
    "cut.jsonl.gz": (gzip.compress(LINES)[:-12], r"cut\.jsonl\.gz: the compressed file is damaged"),
    "plain.jsonl.gz": (LINES, r"plain\.jsonl\.gz: the compressed file is damaged"),
    "plain.jsonl.zst": (LINES, r"plain\.jsonl\.zst: (the compressed file is damaged|cannot be read)"),
    "cut.parquet": (FILES["rows.parquet"][:-20], r"cut\.parquet: cannot be read as Parquet"),
    "open.json": (b'[{"a": 1}, {"a": ', r"open\.json:1 \(row 2\): not JSON \(Expecting value in line 1\)"),
    "tail.json": (b'[{"a": 1}]\n x', r"tail\.json:2: something follows the list of rows"),
    "comma.json": (b'[{"a": 1},]', r"comma\.json:1 \(row 2\): a comma has no row behind it"),
    "gap.json": (b'[{"a": 1}\n{"a": 2}]', r"gap\.json:2: the list of rows does not go on"),
    "deep.json": (b"[" + b'{"a":' * 100_000, r"deep\.json:1: lists and objects are nested too deeply"),
    "utf8.json": (b'[{"a": 1},\n{"a": "\xff"}]', r"utf8\.json:2: byte 8 is not UTF-8"),
    "nan.json": (b'[{"a": 1},\n{"a": NaN}]', r"nan\.json:2: NaN is not JSON"),
    "list.json": (b"[[1]]", r"list\.json:1: a row must be a JSON object, not list"),
    "wide.csv": (b"a,b\n1,2\n1,2,3\n", r"wide\.csv:3: the row has 3 cells and the header 2"),
    "twice.csv": (b"a,a\n1,2\n", r"twice\.csv:1: several columns are called \['a'\]"),
    "header.csv": (b"a,b\n", r"header\.csv: the file is empty"),
    "empty.json": (b" \n", r"empty\.json: the file is empty"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_named(tmp_path, name):
    content, message = DAMAGED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_rows(tmp_path / name))


def test_reading_goes_on_behind_a_bad_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n\xff\n{"a": "' + b"x" * MAX_ROW_BYTES + b'"}\n{"a": 4}\n')

    def outcome(row):
        try:
            return parse_row(row.content)
        except UserError as error:
            return str(error)

    outcomes = [(row.line, outcome(row)) for row in raw_rows(path)]
    assert outcomes[0] == (1, {"a": 1}) and outcomes[3] == (4, {"a": 4})
    assert outcomes[1] == (2, "byte 1 is not UTF-8; save the file as UTF-8")
    assert "the row has 16 MiB, more than the 16 that are read" in outcomes[2][1]


def test_rows_of_a_list_keep_the_lines_they_begin_on(tmp_path):
    rows = [{"a": "x" * 40_000, "n": number} for number in range(10)]
    (tmp_path / "rows.json").write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]")
    assert list(read_rows(tmp_path / "rows.json")) == list(enumerate(rows, start=2))


COUNT = """
import resource, sys
from gptoss_ft.data.source import raw_rows
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
count = sum(1 for _ in raw_rows(sys.argv[1]))
print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "jsonl.gz"])
def test_memory_is_flat_in_the_size_of_the_file(tmp_path, kind):
    row, num_rows = {"prompt": "p" * 2000, "completion": "c"}, 40_000  # 80 MB
    path = tmp_path / f"rows.{kind}"
    line = json.dumps(row) + "\n"
    with gzip.open(path, "wt", compresslevel=1) if kind.endswith("gz") else path.open("w") as file:
        if kind == "csv":
            file.write("prompt,completion\n" + f"{row['prompt']},c\n" * num_rows)
        elif kind == "json":
            file.write("[" + (line + ",") * (num_rows - 1) + line + "]")
        else:
            file.write(line * num_rows)
    result = subprocess.run([sys.executable, "-c", COUNT, str(path)], capture_output=True, text=True, check=True)
    count, kib = map(int, result.stdout.split())
    assert count == num_rows
    assert kib < 20_000 * (1024 if sys.platform == "darwin" else 1)
