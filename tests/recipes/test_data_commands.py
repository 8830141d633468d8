"""`gptoss-ft data ...` as a user runs it."""

import json
import re

import pytest

from gptoss_ft.cli import main
from gptoss_ft.data.dataset import compile_samples
from gptoss_ft.harmony.vocabulary import decode

CALL = {"type": "function", "function": {"name": "f", "arguments": {"y": 1}}}
TOOL = {"name": "f", "parameters": {"type": "object", "properties": {"x": {}}, "required": ["x"]}}


def chat(question, answer, **fields):
    user = {"role": "user", "content": question}
    return {"messages": [user, {"role": "assistant", "content": answer, **fields}]}


@pytest.fixture
def rows(tmp_path):
    """Two fine rows, one of them twice, and one row for each problem."""
    content = [
        chat("1", "one", thinking="think"),
        chat("2", "two", thinking="hm"),
        chat("2", "two", thinking="hm"),
        chat("3", "three"),
        chat("4", "<think>x</think>four", thinking="t"),
        chat("5 [INST]", "five", thinking="t"),
        chat("6", "ca\u00c3\u00a9", thinking="t"),
        chat("7", "seven", thinking="seven"),
        chat("8", "eight", weight=0, thinking="t"),
        {**chat("9", "", tool_calls=[CALL], thinking="t"), "tools": [TOOL]},
        {**chat("10", "ten", thinking="t"), "tools": [TOOL]},
        chat("11", "word " * 300, thinking="t"),
        chat("12", "", tool_calls=[CALL], thinking="t"),
        {**chat("13", "x", thinking="t"), "reasoning_effort": "high"},
    ]
    content[13]["messages"].append({"role": "user", "content": "bye"})
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return path


def problems_of(path, capsys, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert main(["data", "check", f"path={path}"]) == 0
    return re.findall(r"^  ([\d,]+ rows?: .*)$", capsys.readouterr().out, re.M)


@pytest.mark.parametrize(
    ("schema", "fitting", "other"),
    [
        ({"type": "string"}, ["", "x"], [1, None, []]),
        ({"type": "integer"}, [1, -2.0], [1.5, True, "1"]),
        ({"type": "number", "nullable": True}, [1, 1.5, None], [False, "1"]),
        ({"type": ["array", "null"]}, [[], None], [{}, 0]),
        ({"type": "string", "enum": ["a", "b"]}, ["a"], ["c"]),
        ({"type": "object"}, [{}], [[]]),
        ({"type": "float"}, [1, "x"], []),
        ({"anyOf": [{"type": "string"}]}, [1, "x"], []),
        (True, [1], []),
    ],
)
def test_arguments_are_held_against_their_schemas(tmp_path, capsys, schema, fitting, other):
    tool = {"name": "f", "parameters": {"type": "object", "properties": {"x": schema}}}
    for value in fitting + other:
        call = {"type": "function", "function": {"name": "f", "arguments": json.dumps({"x": value})}}
        row = {**chat("q", "", tool_calls=[call], thinking="t"), "tools": [tool]}
        found = [line for line in problems_of(tmp_path / "rows.jsonl", capsys, row) if "not of the type" in line]
        assert len(found) == (value in other and not any(value is fine for fine in fitting)), value


def test_an_answer_that_many_rows_give_is_ranked_with_the_rest(tmp_path, capsys):
    rows = [chat(f"{number}", "Sorry.", thinking="t") for number in range(9)] + [chat("x", " ", thinking="t")]
    assert problems_of(tmp_path / "rows.jsonl", capsys, *rows) == [
        "9 rows: the same answer is given again and again",
        "1 row: an answer is nothing but white space",
    ]


def test_check_counts_and_ranks(rows, capsys):
    assert main(["data", "check", f"path={rows}", "max_length=200"]) == 0
    captured = capsys.readouterr()
    assert "format openai_chat, because it has `messages` and OpenAI's `weight`" in captured.err
    lines = captured.out.splitlines()
    assert lines[0].startswith("14 rows, 14 generations, ")
    for line in ("  openai_chat        14", "  medium        13", "  functions.f         2"):
        assert line in lines
    assert "  1 generations over max_length=200 (the longest has " in captured.out
    assert "  1 generations without loss on any token" in lines
    problems = {
        lines[i][2:]: lines[i + 1].strip() for i in range(len(lines)) if re.match(r"  [\d,]+ rows?: ", lines[i])
    }
    for start, line in {
        "1 row: nothing in the row has loss": 9,
        "1 row: a sample is over max_length=200": 12,
        "1 row: an answer holds <think> tags": 5,
        "1 row: a text holds another template's control tokens": 6,
        "1 row: a call has an argument that its function does not declare": 10,
        "1 row: a call lacks an argument": 10,
        "1 row: a function is called but no tools are declared": 13,
        "1 row: the row ends with a user message": 14,
        "1 row: a text was decoded wrongly": 7,
        "1 row: no reasoning before an answer": 4,
        "1 row: reasoning repeats the answer": 8,
        "1 row: tools are declared and never called": 11,
        "1 row: the row repeats an earlier one": 3,
    }.items():
        (found,) = (where for problem, where in problems.items() if problem.startswith(start))
        assert found == f"first in {rows}:{line}"
    assert len(problems) == 13


def test_tokens_by_channel_add_up_to_the_samples(rows, capsys):
    main(["data", "check", f"path={rows}", "max_length=4096"])
    table = capsys.readouterr().out.partition("tokens by channel or role (with loss)\n")[2].splitlines()[:6]
    parsed = [line.replace(",", "").replace("(", "").replace(")", "").split() for line in table]
    compiled = compile_samples([rows], max_length=4096)
    assert sum(int(loss) for _, _, loss in parsed) == compiled.loss_tokens
    by_name = {name: int(count) for name, count, _ in parsed}
    assert {"system", "user", "analysis", "final", "commentary", "developer"} == by_name.keys()


def test_a_clean_file_has_no_problem(four_rows, capsys):
    assert main(["data", "check", f"path={four_rows}"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("no problem suspected")


def test_check_of_prompts_only(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "q"}], "gold": 1}\n')
    assert main(["data", "check", f"path={path}"]) == 0
    assert "1 rows, 0 generations" in capsys.readouterr().out


def test_skipping_reports_and_keeps_rows_aside(rows, tmp_path, capsys):
    with rows.open("a") as file:
        file.write('{"messages": 3}\n')
    words = ["data", "check", f"path={rows}"]
    assert main(words) == 1
    assert capsys.readouterr().err.rstrip().endswith("rows.jsonl:15: messages: must be a list, not int")
    assert main([*words, "on_error=skip"]) == 1
    assert "1 of 15 rows cannot be used, more than the 5%" in capsys.readouterr().err
    aside = tmp_path / "aside.jsonl"
    assert main([*words, "on_error=skip", "max_skipped=0.1", f"skipped_path={aside}"]) == 0
    assert f"skipped 1 rows, by field: messages (1); they are in {aside}" in capsys.readouterr().out
    assert json.loads(aside.read_text())["line"] == 15


def test_render_writes_every_generation_whole(rows, tmp_path, capsys):
    out = tmp_path / "samples.jsonl"
    assert main(["data", "render", f"path={rows}", f"out={out}", "analysis_weight=0.5"]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [line["row"] for line in lines] == [f"{rows}:{number}" for number in range(1, 15)]
    for line in lines:
        assert list(line) == ["row", "generation", "tokens", "loss_weights", "text"]
        assert len(line["tokens"]) == len(line["loss_weights"])
        assert line["text"] == decode(line["tokens"])
    assert set(lines[0]["loss_weights"]) == {0.0, 0.5, 1.0}


def test_a_fault_leaves_no_half_of_the_output(rows, tmp_path):
    with rows.open("a") as file:
        file.write("{\n")
    assert main(["data", "render", f"path={rows}", f"out={tmp_path / 'samples.jsonl'}"]) == 1
    assert main(["data", "preview", f"path={rows}", f"out={tmp_path / 'page.html'}", "count=99"]) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


def test_preview_in_the_terminal(rows, capsys):
    assert main(["data", "preview", f"path={rows}", "count=2"]) == 0
    text = capsys.readouterr().out
    assert text.count("with loss (+)") == 2
    assert "+ | <|channel|>analysis<|message|>think<|end|>\n+ | <|start|>assistant<|channel|>final" in text
    assert "  | <|start|>user<|message|>1<|end|>\n" in text
    assert "\x1b" not in text  # no colours where there is no terminal


def test_training_skips_rows_and_keeps_them_beside_the_run(tiny_base, four_rows, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text(four_rows.read_text() + "{\n")
    run = tmp_path / "run"
    words = ["train", "config=quickstart", f"run.dir={run}", f"model.path={tiny_base}", f"data.path={path}"]
    words += ["data.eval_fraction=0", "trainer.max_steps=1", "trainer.warmup_steps=0", "export.formats=[]"]
    assert main([*words, "data.on_error=skip", "data.max_skipped=0.2"]) == 0
    assert "skipped 1 rows, by field: row (1)" in capsys.readouterr().out
    assert json.loads((tmp_path / "run.skipped.jsonl").read_text())["line"] == 5
