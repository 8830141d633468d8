"""Rows through a function: order kept on any number of processes, faults named, skipped rows reported."""

import json

import pytest

from gptoss_ft.data.rows import CHUNK_ROWS, RowSettings, map_rows
from gptoss_ft.data.skipped import SkippedRows, without_indices
from gptoss_ft.errors import UserError
from gptoss_ft.harmony.conversation import Conversation

SKIP = RowSettings(on_error="skip", max_skipped=0.5)


def answer(conversation: Conversation) -> str:
    """Picklable, and strict about one word."""
    content = conversation.messages[-1].content
    if content == "forbidden":
        raise UserError("the answer is forbidden; change it")
    return content


def row(content, role="assistant"):
    return json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": role, "content": content}]})


@pytest.fixture
def write(tmp_path):
    def write(*lines, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize("num_processes", [1, 2])
def test_order_and_places_are_kept(write, num_processes):
    one = write(*map(row, map(str, range(CHUNK_ROWS + 2))))
    two = write("", row("last"), name="two.jsonl")
    told = []
    rows = list(map_rows([one, two], answer, RowSettings(num_processes=num_processes), announce=told.append))
    assert [row.result for row in rows] == [*map(str, range(CHUNK_ROWS + 2)), "last"]
    assert (rows[0].where, rows[-1].where, rows[-1].format) == (f"{one}:1", f"{two}:2", "messages")
    assert told == [
        f"{one}: format messages, because it has a list of `messages` (line 1)",
        f"{two}: format messages, because it has a list of `messages` (line 2)",
    ]


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("rows.json", "[{good}, {good}, x{good}, {good}]", r"rows\.json:1 \(row 3\): not JSON"),
        ("open.json", "[{good}, {good}", r"open\.json:2: the list of rows does not go on"),
        ("rows.csv", "prompt,completion,prompt\nq,a,q\n", r"rows\.csv:1: several columns"),
    ],
)
def test_the_unreadable_rest_of_a_file_is_never_skipped(write, name, content, fault):
    path = write(content.replace("{good}", row("a")), name=name)
    settings = RowSettings(format="messages", on_error="skip", max_skipped=1)
    with pytest.raises(UserError, match=fault + ".*cannot be skipped alone"):
        list(map_rows([path], answer, settings))


def test_rows_on_one_line_are_told_apart(write, tmp_path):
    path = write(f"[{row('a')}, {row('b', role='wizard')}]", name="rows.json")
    with pytest.raises(UserError, match=r"rows\.json:1 \(row 2\): messages\[1\]\.role"):
        list(map_rows([path], answer))
    with SkippedRows(tmp_path / "skipped.jsonl") as skipped:
        list(map_rows([path], answer, SKIP, skipped=skipped))
    assert json.loads((tmp_path / "skipped.jsonl").read_text())["number"] == 2


@pytest.mark.parametrize("num_processes", [1, 2])
def test_faults_stop_or_are_skipped(write, tmp_path, num_processes):
    path = write(row("a"), "{", row("forbidden"), row("b", role="wizard"), *[row("c")] * 4)
    with pytest.raises(UserError, match=r"rows\.jsonl:2: not JSON"):
        list(map_rows([path], answer, RowSettings(num_processes=num_processes)))
    settings = RowSettings(on_error="skip", max_skipped=0.5, num_processes=num_processes)
    with SkippedRows(tmp_path / "skipped.jsonl") as skipped:
        rows = list(map_rows([path], answer, settings, skipped=skipped))
    assert [row.result for row in rows] == ["a", *"cccc"]
    assert skipped.count == 3 and dict(skipped.by_field) == {"row": 2, "messages[].role": 1}
    assert f"skipped 3 rows, by field: row (2), messages[].role (1); they are in {tmp_path / 'skipped.jsonl'}" in str(
        skipped
    )
    records = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(record["file"], record["line"], record["field"]) for record in records] == [
        (str(path), 2, ""),
        (str(path), 3, ""),
        (str(path), 4, "messages[1].role"),
    ]
    assert "'wizard' is not a role" in records[2]["error"]
    assert [record["row"].strip() for record in records] == path.read_text().splitlines()[1:4]


def test_more_than_the_share_stops_and_keeps_the_report(write, tmp_path):
    path = write(row("a"), *["{"] * 2, *[row("b")] * 17)
    list(map_rows([path], answer, RowSettings(on_error="skip", max_skipped=0.1)))
    with (
        pytest.raises(
            UserError, match=r"2 of 20 rows cannot be used, more than the 5%.*rows\.jsonl:2: not JSON"
        ) as error,
        SkippedRows(tmp_path / "skipped.jsonl") as skipped,
    ):
        list(map_rows([path], answer, RowSettings(on_error="skip"), skipped=skipped))
    assert "\n" not in str(error.value)
    assert (tmp_path / "skipped.jsonl").read_text().count("\n") == 2


def test_the_share_itself_may_be_skipped_and_not_one_more(write):
    settings = RowSettings(on_error="skip")
    assert len(list(map_rows([write("{", *[row("a")] * 19)], answer, settings))) == 19
    with pytest.raises(UserError, match="1 of 19 rows"):
        list(map_rows([write("{", *[row("a")] * 18)], answer, settings))


def test_an_interruption_leaves_no_half_report(write, tmp_path):
    path = write(row("a"), "{", row("b"))
    with pytest.raises(KeyboardInterrupt), SkippedRows(tmp_path / "skipped.jsonl") as skipped:
        for read in map_rows([path], answer, SKIP, skipped=skipped):
            if read.result == "b":
                raise KeyboardInterrupt
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


def test_no_report_without_a_skipped_row(write, tmp_path):
    with SkippedRows(tmp_path / "skipped.jsonl") as skipped:
        list(map_rows([write(row("a"))], answer, SKIP, skipped=skipped))
    assert not (tmp_path / "skipped.jsonl").exists()


def test_bytes_that_are_not_text_can_be_reported(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(row("a").encode() + b'\n{"\xff\n' + row("b\ud800").encode() + b"\n")
    with SkippedRows(tmp_path / "skipped.jsonl") as skipped:
        list(map_rows([path], answer, RowSettings(on_error="skip", max_skipped=1), skipped=skipped))
    first, _ = map(json.loads, (tmp_path / "skipped.jsonl").read_text(encoding="utf-8").splitlines())
    assert first["row"] == '{"\\xff\n'


def test_prompts_without_answers_are_refused_for_training_and_counted_otherwise(write):
    path = write(json.dumps({"messages": [{"role": "user", "content": "q"}], "gold": 1}))
    with pytest.raises(UserError, match=r"openai_rft, because .* supervised fine-tuning learns from answers"):
        list(map_rows([path], answer))
    (read,) = map_rows([path], answer, needs_answers=False)
    assert read.result == "q"


def test_a_file_of_unreadable_rows_is_named_by_its_first(write):
    with pytest.raises(UserError, match=r"rows\.jsonl:1: not JSON"):
        list(map_rows([write("{", "{")], answer, SKIP))


@pytest.mark.parametrize(
    ("field", "without"),
    [("messages[3].content", "messages[].content"), ("a[0].b[12]", "a[].b[]"), ("plain", "plain"), ("", "")],
)
def test_indices_are_left_out_of_counts(field, without):
    assert without_indices(field) == without
