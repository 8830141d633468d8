"""Whatever a file holds, a row is read or refused by name: no other error, no hang."""

import copy
import io
import json
import sys
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptoss_ft.data.detect import detect
from gptoss_ft.data.json_file import json_objects
from gptoss_ft.data.measure import measure
from gptoss_ft.data.schemas.registry import READERS
from gptoss_ft.data.source import MAX_ROW_BYTES, parse_row
from gptoss_ft.data.tables import csv_rows
from gptoss_ft.errors import UserError
from gptoss_ft.harmony.generations import generations
from gptoss_ft.harmony.vocabulary import decode
from gptoss_ft.harmony.weights import LossRules

from .test_data_readers import CALL_ROWS, HARMONY, THINKING_ROWS

SEEDS = [*THINKING_ROWS.values(), *CALL_ROWS.values(), {"text": HARMONY}]
WORDS = """
    messages role content thinking tool_calls function name arguments tools parameters properties type object user
    assistant tool system input output items from value human gpt conversations prompt completion chosen rejected
    weight label reasoning effort text <|start|> <|message|> <|end|> <|channel|> {} [] [{}] {{item.x}} null
""".split()  # noqa: SIM905
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**400, -(10**400), 2**64, 1e308, 1e-320, float("nan"), float("inf")]),
    st.floats(),
    st.sampled_from(WORDS),
    st.text(st.characters(exclude_categories=(), exclude_characters="\ufffd"), max_size=8),
    st.sampled_from(["\ud800", " " * 1_000_000]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


def places(value, path=()):
    """The path of every value inside, the value itself included."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from places(item, (*path, key))


@st.composite
def damaged_rows(draw):
    """A good row with a few of its values replaced, dropped or repeated."""
    row = copy.deepcopy(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 3))):
        inner = [path for path in places(row) if path]
        if not inner:
            break
        path = draw(st.sampled_from(inner))
        holder = row
        for key in path[:-1]:
            holder = holder[key]
        match draw(st.sampled_from(["replace", "drop", "repeat"])):
            case "replace":
                holder[path[-1]] = draw(VALUES)
            case "drop":
                del holder[path[-1]]
            case "repeat" if isinstance(holder, list):
                holder.insert(path[-1], copy.deepcopy(holder[path[-1]]))
    return row


def read_whole(row):
    """Through everything that a row goes through; True if it was read."""
    try:
        conversation = READERS[detect([(1, row)]).format].read(row)
        measured = measure(conversation, LossRules())
    except UserError as error:
        assert str(error) and "\n" not in str(error).strip()
        return False
    assert all(sample.tokens >= sample.loss_tokens for sample in measured.generations)
    for sample in generations(conversation):
        # The tokenizer would put this character in place of one that has no UTF-8.
        assert "\ufffd" not in decode(sample.prompt_ids + sample.completion_ids)
        assert np.isfinite(np.float32(sample.loss_weights)).all()
    return True


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(damaged_rows())
def test_damaged_rows_are_read_or_refused(row):
    read_whole(row)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(WORDS), VALUES, max_size=4), st.sampled_from(sorted(READERS)))
def test_any_object_is_read_or_refused_by_every_reader(row, format):
    with suppress(UserError):
        READERS[format].read(row)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60) | st.text(max_size=40).map(lambda text: json.dumps({"a": text}).encode()[:-1]))
def test_any_line_is_parsed_or_refused(line):
    with suppress(UserError):
        assert isinstance(parse_row(line), dict)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.dictionaries(st.text(max_size=4), st.text(max_size=9) | st.integers() | st.none(), max_size=3), max_size=5
    ),
    st.sampled_from([None, 1]),
    st.booleans(),
    st.booleans(),
    st.integers(1, 40),
)
def test_a_json_file_of_any_layout_gives_its_rows(rows, indent, escaped, in_list, window):
    texts = [json.dumps(row, indent=indent, ensure_ascii=escaped) for row in rows]
    text = f"[{','.join(texts)}]" if in_list else "\n ".join(texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gptoss_ft.data.json_file.WINDOW", window)
        found = list(json_objects(io.BytesIO(text.encode("utf-8", "surrogatepass")), MAX_ROW_BYTES))
    if "\\ud" not in text and text.isascii():
        assert [parse_row(content) for _, content in found] == rows
        assert [line for line, _ in found] == sorted(line for line, _ in found)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=80), st.sampled_from([json_objects, csv_rows]))
def test_any_bytes_are_a_file_that_ends(content, read):
    for _, row in read(io.BytesIO(content), MAX_ROW_BYTES):
        with suppress(UserError):
            parse_row(row)


@pytest.mark.parametrize("depth", [500, 10_000, 1_000_000])
def test_depth_is_refused_wherever_it_is(depth):
    nested = "[" * depth + "]" * depth
    chat = '"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'
    for row in (
        f'{{"messages": {nested}}}',
        f'{{{chat}, "tools": [{{"name": "f", "parameters": {{"a": {nested}}}}}]}}',
        f'{{{chat}, "anything": {nested}}}',
        json.dumps({"conversations": [{"from": "function_call", "value": nested}]}),
    ):
        try:
            with suppress(UserError):
                read_whole(parse_row(row.encode()))
        except RecursionError:  # `map_rows` gives it its name
            assert depth < sys.getrecursionlimit()


@pytest.mark.parametrize(
    "value",
    ["[" + '"a",' * 2_000_000 + '"a"]', '"' + "\\ud83e\\udee0" * 700_000 + '"', "1" * 4000],
    ids=["list", "text", "int"],
)
def test_long_values_take_no_longer_than_they_are_long(value):
    row = parse_row(f'{{"messages": [{{"role": "user", "content": "q"}}], "gold": {value}}}'.encode())
    assert read_whole(row)
