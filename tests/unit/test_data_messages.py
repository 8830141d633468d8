import json

import pytest

from gptoss_ft.data.schemas.messages import read_messages_row
from gptoss_ft.errors import UserError
from gptoss_ft.harmony.conversation import DEFAULT_IDENTITY, Conversation, Message, ResponseFormat, Tool
from gptoss_ft.harmony.generations import generations
from gptoss_ft.harmony.vocabulary import decode

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
PARAMETERS = {"type": "object", "properties": {"x": {"type": "integer"}}}


def call(name="f", arguments="{}", id_=None):
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}


def calls(*tool_calls, **fields):
    return {"role": "assistant", "content": None, "tool_calls": list(tool_calls), **fields}


def result(content, **fields):
    return {"role": "tool", "content": content, **fields}


def read(*messages, **row):
    return read_messages_row({"messages": list(messages), **row})


def called(name, arguments):
    return Message("assistant", arguments, "commentary", f"functions.{name}", "json")


def answered(name, content):
    return Message("tool", content, "commentary", "assistant", name=f"functions.{name}")


@pytest.mark.parametrize("key", ["thinking", "reasoning_content", "reasoning"])
def test_thinking_then_answer(key):
    conversation = read(USER, {**ANSWER, key: "t"})
    assert conversation.messages == (
        Message("user", "q"),
        Message("assistant", "t", "analysis"),
        Message("assistant", "a", "final"),
    )


def test_nulls_are_as_absent():
    filled = {"thinking": None, "tool_calls": None, "name": None, "tool_call_id": None, "weight": None}
    conversation = read({**USER, **filled}, {**ANSWER, **filled}, tools=None, reasoning_effort=None)
    assert conversation == read(USER, ANSWER)


def test_system_and_developer_messages_are_instructions():
    system, developer = {"role": "system", "content": "one"}, {"role": "developer", "content": "two"}
    assert read(system, developer, USER, ANSWER).instructions == "one\n\ntwo"
    assert read({"role": "system", "content": ""}, USER, ANSWER).instructions is None
    later = read(USER, ANSWER, developer, USER, ANSWER)
    assert later.instructions is None
    assert later.messages[2] == Message("developer", "two")


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}, "c"]
    assert read({"role": "user", "content": parts}, ANSWER).messages[0].content == "abc"


def test_calls_and_the_preamble_beside_them():
    turn = calls(call("f", {"x": "é"}), content="let me see", thinking="t")
    assert read(USER, turn).messages[1:] == (
        Message("assistant", "t", "analysis"),
        Message("assistant", "let me see", "commentary"),
        called("f", '{"x":"é"}'),
    )


@pytest.mark.parametrize(
    ("arguments", "written"),
    [({"x": 1, "y": [None]}, '{"x":1,"y":[null]}'), ('{"x": 1}', '{"x": 1}'), ({}, "{}"), ("", "{}"), (None, "{}")],
)
def test_arguments_are_encoded_once(arguments, written):
    assert read(USER, calls(call("f", arguments))).messages[1].content == written


def test_results_go_behind_their_calls_by_id():
    turn = calls(call("f", id_="1"), call("g", id_="2"))
    conversation = read(USER, turn, result("of g", tool_call_id="2"), result("of f", tool_call_id="1"), ANSWER)
    assert conversation.messages[1:5] == (
        called("f", "{}"),
        answered("f", "of f"),
        called("g", "{}"),
        answered("g", "of g"),
    )
    samples = generations(conversation)
    assert [decode(sample.completion_ids).rpartition("<|")[2] for sample in samples] == ["call|>", "call|>", "return|>"]
    assert "of f" in decode(samples[1].prompt_ids) and "of g" not in decode(samples[1].prompt_ids)


def test_results_without_ids_match_by_name_then_position():
    turn = calls(call("f"), call("g"), call("f", '{"x":2}'))
    conversation = read(USER, turn, result("of g", name="g"), result("first"), result("second"), ANSWER)
    assert [m.content for m in conversation.messages if m.role == "tool"] == ["first", "of g", "second"]


def test_result_objects_and_empty_results():
    conversation = read(USER, calls(call(), call()), result({"t": "é"}), result(""), ANSWER)
    assert [m.content for m in conversation.messages if m.role == "tool"] == ['{"t": "é"}', ""]


def test_tool_names_are_made_safe_everywhere():
    tools = [{"type": "function", "function": {"name": "math.add", "description": "d", "parameters": PARAMETERS}}]
    conversation = read(USER, calls(call("math.add")), result("3", name="math.add"), ANSWER, tools=tools)
    assert conversation.tools == (Tool("math_add", "d", PARAMETERS),)
    assert conversation.messages[1:3] == (called("math_add", "{}"), answered("math_add", "3"))


@pytest.mark.parametrize("wrap", [list, json.dumps], ids=["list", "JSON string"])
def test_tools_bare_or_wrapped_and_without_nulls(wrap):
    bare = {
        "name": "f",
        "description": None,
        "parameters": {"type": "object", "properties": {"x": None}, "required": None},
    }
    wrapped = {"type": "function", "function": {"name": "g", "parameters": None}}
    read_tools = read(USER, ANSWER, tools=wrap([bare, wrapped])).tools
    assert read_tools == (Tool("f", "", {"type": "object", "properties": {}}), Tool("g"))


def test_a_default_of_null_is_kept_where_no_table_has_put_nulls():
    written = {"properties": {"x": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None}}}
    filled = {"properties": {"x": {"type": "string", "enum": None, "default": None}}}
    read_tools = read(USER, ANSWER, tools=[{"name": name, "parameters": written} for name in "fg"]).tools
    assert [tool.parameters for tool in read_tools] == [written] * 2
    (tool,) = read(USER, ANSWER, tools=[{"name": "f", "parameters": filled}]).tools
    assert tool.parameters == {"properties": {"x": {"type": "string"}}}


def test_a_channel_that_a_message_names_is_its_contents():
    split = [USER, {**ANSWER, "content": "hm", "channel": "analysis"}, {**ANSWER, "channel": "final"}]
    assert read(*split).messages == read(USER, {**ANSWER, "thinking": "hm"}).messages
    said = {"role": "assistant", "content": "one moment", "channel": "commentary"}
    assert read(USER, said, calls(call()), result("1"), ANSWER).messages[1].is_preamble
    for fault, message in (({"channel": "thoughts"}, "is not a channel"), ({"recipient": "functions.f"}, "tool_calls")):
        with pytest.raises(UserError, match=message):
            read(USER, {**ANSWER, **fault})


def test_row_settings():
    assert read(USER, ANSWER).reasoning_effort == "medium"
    assert read(USER, ANSWER).model_identity == DEFAULT_IDENTITY
    defaults = Conversation(
        (), reasoning_effort="low", model_identity="A parrot.", conversation_start_date="2025-06-28"
    )
    by_default = read_messages_row({"messages": [USER, ANSWER]}, defaults=defaults)
    assert (by_default.reasoning_effort, by_default.model_identity) == ("low", "A parrot.")
    assert by_default.conversation_start_date == "2025-06-28"
    inner = {"reasoning_effort": "high", "model_identity": "You are Ada."}
    conversation = read(USER, ANSWER, chat_template_kwargs=inner)
    assert (conversation.reasoning_effort, conversation.model_identity) == ("high", "You are Ada.")
    assert read(USER, ANSWER, reasoning_effort="low", chat_template_kwargs=inner).reasoning_effort == "low"


def test_weight_zero_gives_no_loss():
    conversation = read(USER, {**ANSWER, "weight": 0}, USER, ANSWER)
    assert [set(sample.loss_weights) for sample in generations(conversation)] == [{0.0}, {1.0}]


@pytest.mark.parametrize(
    ("fields", "weight"),
    [({"weight": 0.5}, 0.5), ({"train": False}, 0.0), ({"train": True, "weight": 2}, 2.0), ({"train": True}, 1.0)],
)
def test_a_message_weighs_as_it_says(fields, weight):
    assert read(USER, {**ANSWER, **fields}).messages[-1].weight == weight


@pytest.mark.parametrize(
    ("name", "arguments", "written"),
    [
        ("python", {"code": "1+1"}, "1+1"),
        ("python", '{"code": "1+1"}', "1+1"),
        ("python", "print(1)", "print(1)"),
        ("browser.search", {"query": "é"}, '{"query":"é"}'),
    ],
)
def test_built_in_tools_are_called_on_the_analysis_channel(name, arguments, written):
    turn = [USER, calls(call(name, arguments), thinking="t"), result("2", name=name), ANSWER]
    offered = [{"type": "code_interpreter"}, {"type": "browser_search"}]
    conversation = read(*turn, tools=offered)
    assert conversation.builtin_tools == ("python", "browser")
    assert conversation.messages[2:4] == (
        Message("assistant", written, "analysis", name, "code", constrained=False),
        Message("tool", "2", "analysis", "assistant", name=name),
    )
    assert read(*turn, chat_template_kwargs={"builtin_tools": ["python", "browser"]}) == conversation
    function = read(*turn[:1], calls(call("python", "{}")), tools=[{"name": "python"}])
    assert function.messages[1] == called("python", "{}")


def test_response_format():
    schema = {"type": "object", "properties": {}}
    described = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    assert read(USER, ANSWER, response_format=described).response_formats == (ResponseFormat("n", schema),)
    assert read(USER, ANSWER, response_format={"type": "text"}).response_formats == ()


BAD_ROWS = {
    "messages: must be a list, not absent": {},
    "messages: must be a list, not str": {"messages": "hi"},
    "messages: has no assistant message": {"messages": [USER]},
    "messages[0]: must be a JSON object, not str": {"messages": ["hi", ANSWER]},
    "messages[0].role: must be text, not absent": {"messages": [{"content": "hi"}, ANSWER]},
    "messages[0].role: 'bot' is not a role; use one of system": {"messages": [{"role": "bot", "content": "q"}, ANSWER]},
    "messages[0].content: must be text, not int": {"messages": [{"role": "user", "content": 3}, ANSWER]},
    "messages[0].content: is empty": {"messages": [{"role": "user", "content": ""}, ANSWER]},
    "messages[0].content[1].type: 'image_url' content cannot be used": {
        "messages": [{"role": "user", "content": ["a", {"type": "image_url", "image_url": "x"}]}, ANSWER]
    },
    "messages[1]: an assistant message needs content or tool_calls": {
        "messages": [USER, {"role": "assistant", "thinking": "t"}]
    },
    "messages[1].weight: must be 0": {"messages": [USER, {**ANSWER, "weight": -0.5}]},
    "messages[1].weight: must be 0 (no": {"messages": [USER, {**ANSWER, "weight": True}]},
    "messages[1].train: must be true": {"messages": [USER, {**ANSWER, "train": 1}]},
    "builtin_tools[0]: 'perl' is not": {"messages": [USER, ANSWER], "builtin_tools": ["perl"]},
    "response_format.type: 'xml' is": {"messages": [USER, ANSWER], "response_format": {"type": "xml"}},
    "messages[1].tool_calls: must be a list": {"messages": [USER, {**ANSWER, "tool_calls": call()}]},
    "messages[1].tool_calls[0].function: must be a JSON object": {"messages": [USER, calls({"id": "1"})]},
    "messages[1].tool_calls[0].function.name: is empty": {"messages": [USER, calls(call(""))]},
    "messages[1].tool_calls[1].function.arguments: is not JSON": {"messages": [USER, calls(call(), call("f", "{x}"))]},
    "messages[1].tool_calls[0].function.arguments: must be a JSON object": {"messages": [USER, calls(call("f", [1]))]},
    "it is encoded twice": {"messages": [USER, calls(call("f", json.dumps('{"x": 1}')))]},
    "function.arguments: NaN is not JSON": {"messages": [USER, calls(call("f", '{"x": NaN}'))]},
    "function.name: 'g' is not among the row's tools": {"messages": [USER, calls(call("g"))], "tools": [{"name": "f"}]},
    "messages[1]: is a tool result without a call": {"messages": [USER, result("r"), ANSWER]},
    "messages[3]: is a tool result without a call": {
        "messages": [USER, calls(call()), result("r"), result("r"), ANSWER]
    },
    "messages[3]: is a tool result without": {"messages": [USER, calls(call()), ANSWER, result("late")]},
    "messages[2].tool_call_id: '9' is not the id of an open call; those are ['1']": {
        "messages": [USER, calls(call(id_="1")), result("r", tool_call_id="9"), ANSWER]
    },
    "messages[2].name: no open call is to 'g'": {"messages": [USER, calls(call()), result("r", name="g"), ANSWER]},
    "tools: is not JSON": {"messages": [USER, ANSWER], "tools": "["},
    "tools: must be a list": {"messages": [USER, ANSWER], "tools": {"name": "f"}},
    "tools[0].type: 'browser' tools cannot be used": {"messages": [USER, ANSWER], "tools": [{"type": "browser"}]},
    "tools[0].name: must be text": {"messages": [USER, ANSWER], "tools": [{}]},
    "tools[0].parameters: must be a JSON object": {
        "messages": [USER, ANSWER],
        "tools": [{"name": "f", "parameters": 1}],
    },
    "tools: several tools are called ['a_b']": {
        "messages": [USER, ANSWER],
        "tools": [{"name": "a.b"}, {"name": "a_b"}],
    },
    "reasoning_effort: 'max' is not an effort; use one of low, medium, high": {
        "messages": [USER, ANSWER],
        "reasoning_effort": "max",
    },
    "chat_template_kwargs.reasoning_effort: 3 is not an effort": {
        "messages": [USER, ANSWER],
        "chat_template_kwargs": {"reasoning_effort": 3},
    },
}


@pytest.mark.parametrize("message", BAD_ROWS)
def test_errors_name_the_field(message):
    with pytest.raises(UserError) as error:
        read_messages_row(BAD_ROWS[message])
    assert message in str(error.value)
