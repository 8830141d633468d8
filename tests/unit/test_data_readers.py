"""Every row format says the same conversation, and names what is wrong with a row by the field as the row spells it."""

import json
from datetime import date

import pytest

from gptoss_ft.data.detect import detect
from gptoss_ft.data.schemas.openai_preference import read_openai_preference_pair
from gptoss_ft.data.schemas.openai_rft import read_rft_row
from gptoss_ft.data.schemas.preference import read_preference_pair
from gptoss_ft.data.schemas.registry import READERS
from gptoss_ft.errors import UserError
from gptoss_ft.harmony.conversation import Conversation, Message, ResponseFormat, Tool
from gptoss_ft.harmony.generations import generations
from gptoss_ft.harmony.vocabulary import decode

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
THOUGHT = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "t"}]}
PARAMETERS = {"type": "object", "properties": {"x": {"type": "integer"}}}
FUNCTION = {"name": "f", "description": "d", "parameters": PARAMETERS}


def read(format, **row):
    return READERS[format].read(row)


def text(content):
    return [{"type": "output_text", "text": content}]


def rendered(conversation):
    """What is trained, generation by generation."""
    return [decode([*sample.prompt_ids, *sample.completion_ids]) for sample in generations(conversation)]


THINKING_ROWS = {
    "messages": {"messages": [USER, {**ANSWER, "thinking": "t"}]},
    "openai_chat": {"messages": [USER, {**ANSWER, "reasoning_content": "t", "weight": 1}]},
    "multilingual_thinking": {
        "user": "q",
        "analysis": "t",
        "final": "a",
        "developer": None,
        "reasoning_language": None,
    },
    "openai_responses": {
        "input": [{"role": "user", "content": "q", "type": "message"}],
        "output": [
            {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "t"}], "summary": []},
            {"type": "message", "role": "assistant", "content": text("a"), "phase": "final_answer"},
        ],
    },
    "openai_preference": {
        "input": {"messages": [USER]},
        "preferred_output": [{**ANSWER, "thinking": "t"}],
        "non_preferred_output": [{**ANSWER, "content": "b"}],
    },
    "preference": {"prompt": "q", "chosen": [{**ANSWER, "thinking": "t"}], "rejected": "b"},
    "prompt_completion": {"prompt": "q", "completion": [{**ANSWER, "thinking": "t"}]},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "<think>\nt\n</think>\n\na"}]
    },
    "alpaca": {"instruction": "q", "input": "", "output": "<think>t</think>a"},
    "harmony": {
        "text": "<|start|>user<|message|>q<|end|><|start|>assistant<|channel|>analysis<|message|>t<|end|>"
        "<|start|>assistant<|channel|>final<|message|>a<|return|>"
    },
}


@pytest.mark.parametrize("format", THINKING_ROWS)
def test_a_thought_through_answer_is_the_same_in_every_format(format):
    row = THINKING_ROWS[format]
    assert rendered(READERS[format].read(row)) == rendered(READERS["messages"].read(THINKING_ROWS["messages"]))
    assert detect([(1, row)]).format == format


@pytest.mark.parametrize("format", THINKING_ROWS)
def test_defaults_are_taken_where_a_row_states_nothing(format):
    defaults = Conversation((), reasoning_effort="high", model_identity="A parrot.")
    conversation = READERS[format].read(THINKING_ROWS[format], defaults=defaults)
    assert (conversation.reasoning_effort, conversation.model_identity) == ("high", "A parrot.")


CALL = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
CALL_ROWS = {
    "messages": {
        "messages": [
            USER,
            {"role": "assistant", "thinking": "t", "content": "p", "tool_calls": [CALL]},
            {"role": "tool", "content": "r"},
            ANSWER,
        ],
        "tools": [{"type": "function", "function": FUNCTION}],
    },
    "openai_chat": {
        "messages": [
            USER,
            {"role": "assistant", "content": "p", "thinking": "t", "function_call": CALL["function"]},
            {"role": "function", "name": "f", "content": "r"},
            ANSWER,
        ],
        "functions": [FUNCTION],
    },
    "openai_responses": {
        "items": [
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "q"}]},
            {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "t"}]},
            {"type": "message", "role": "assistant", "content": text("p"), "phase": "commentary"},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": '{"x": 1}'},
            {"type": "function_call_output", "call_id": "c", "output": "r"},
            {"type": "message", "role": "assistant", "content": text("a")},
        ],
        "tools": [{"type": "function", **FUNCTION, "strict": True}],
    },
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "r"},
            {"from": "gpt", "value": "a"},
        ],
        "tools": json.dumps([FUNCTION]),
    },
}


@pytest.mark.parametrize("format", CALL_ROWS)
def test_calls_and_results_are_the_same_in_every_format(format):
    conversation = READERS[format].read(CALL_ROWS[format])
    compact = format == "sharegpt"
    expected = [
        Message("user", "q"),
        Message("assistant", "t", "analysis"),
        Message("assistant", "p", "commentary"),
        Message("assistant", '{"x":1}' if compact else '{"x": 1}', "commentary", "functions.f", "json"),
        Message("tool", "r", "commentary", "assistant", name="functions.f"),
        Message("assistant", "a", "final"),
    ]
    assert conversation.messages == tuple(expected[:1] + expected[3:] if compact else expected)
    assert conversation.tools == (Tool("f", "d", PARAMETERS),)
    assert detect([(1, CALL_ROWS[format])]).format == format


def test_multilingual_thinking_instructions_are_those_of_its_messages():
    columns = {"user": "q", "analysis": "t", "final": "a", "developer": "Be kind.", "reasoning_language": "French"}
    system = {"role": "system", "content": "reasoning language: French\n\nBe kind."}
    messages = [system, USER, {**ANSWER, "thinking": "t"}]
    assert read("multilingual_thinking", **columns) == read("messages", messages=messages)


def test_openai_refusal_is_the_final_answer():
    conversation = read("openai_chat", messages=[USER, {"role": "assistant", "content": None, "refusal": "No."}])
    assert conversation.messages[-1] == Message("assistant", "No.", "final")


def test_of_a_logged_response_only_the_output_has_loss():
    asked = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "3"}]
    conversation = read(
        "openai_responses",
        instructions="Be kind.",
        input=asked,
        output=[{"type": "message", "role": "assistant", "content": text("4")}],
        reasoning={"effort": "high"},
    )
    assert (conversation.instructions, conversation.reasoning_effort) == ("Be kind.", "high")
    assert [m.weight for m in conversation.messages if m.role == "assistant"] == [0.0, 1.0]
    assert (
        read("openai_responses", input="3", output=[{"role": "assistant", "content": "4"}]).messages[0].content == "3"
    )


def test_the_shape_that_a_response_was_asked_for_is_kept():
    shape = {"type": "json_schema", "name": "n", "strict": True, "schema": {"type": "object"}}
    kept = read("openai_responses", input="q", output=[ANSWER], text={"format": shape, "verbosity": "low"})
    assert kept.response_formats == (ResponseFormat("n", {"type": "object"}),)
    plain = read("openai_responses", input="q", output=[ANSWER], text={"format": {"type": "text"}})
    assert plain.response_formats == ()


@pytest.mark.parametrize(
    ("format", "row"),
    [
        ("alpaca", {"instruction": "q", "output": "a"}),
        ("multilingual_thinking", {"user": "q", "analysis": "t", "final": "a"}),
    ],
)
def test_tools_of_formats_without_calls_are_declared(format, row):
    assert read(format, **row, tools=[FUNCTION]).tools == (Tool("f", "d", PARAMETERS),)


def test_parallel_calls_of_a_response_go_with_their_results():
    calls = [{"type": "function_call", "call_id": i, "name": "f", "arguments": "{}"} for i in "ab"]
    results = [{"type": "function_call_output", "call_id": i, "output": f"of {i}"} for i in "ba"]
    conversation = read("openai_responses", items=[USER, *calls, *results, ANSWER])
    assert [m.content for m in conversation.messages] == ["q", "{}", "of a", "{}", "of b", "a"]


def test_reasoning_without_its_text_is_left_out():
    encrypted = {"type": "reasoning", "encrypted_content": "xyz", "summary": [{"type": "summary_text", "text": "s"}]}
    row = {"items": [USER, encrypted, {"type": "message", **ANSWER}]}
    assert [m.content for m in read("openai_responses", **row).messages] == ["q", "a"]
    assert "encrypted reasoning and summaries of reasoning are left out" in str(detect([(1, row)]))


def test_only_the_chosen_answer_is_learned_and_the_pair_is_there():
    history = [USER, ANSWER, USER]
    row = {"prompt": history, "chosen": [{**ANSWER, "content": "good"}], "rejected": [{**ANSWER, "content": "bad"}]}
    chosen, rejected = read_preference_pair(row)
    assert chosen == read("preference", **row)
    assert (chosen.messages[-1].content, rejected.messages[-1].content) == ("good", "bad")
    assert [m.weight for m in chosen.messages if m.role == "assistant"] == [0.0, 1.0]
    implicit = {"chosen": [*history, *row["chosen"]], "rejected": [*history, *row["rejected"]]}
    assert read_preference_pair(implicit) == (chosen, rejected)
    assert read_preference_pair({"prompt": history, **implicit}) == (chosen, rejected)
    assert read_preference_pair({"prompt": USER["content"], **implicit}) == (chosen, rejected)
    openai = {
        "input": {"messages": history, "tools": [FUNCTION], "parallel_tool_calls": True},
        "preferred_completion": row["chosen"],
        "non_preferred_completion": row["rejected"],
    }
    better, worse = read_openai_preference_pair(openai)
    assert (better.messages, worse.messages) == (chosen.messages, rejected.messages)
    assert better.tools == (Tool("f", "d", PARAMETERS),)


@pytest.mark.parametrize(("label", "weight"), [(None, 1.0), (True, 1.0), (False, 0.0)])
def test_a_completion_labelled_bad_has_no_loss(label, weight):
    conversation = read("prompt_completion", prompt="q", completion="a", label=label)
    assert conversation.messages[-1] == Message("assistant", "a", "final", weight=weight)


def test_alpaca_history_and_input():
    conversation = read("alpaca", instruction="i", input="in", output="o", system="s", history=[["hq", "ha"]])
    assert conversation.instructions == "s"
    assert [m.content for m in conversation.messages] == ["hq", "ha", "i\n\nin", "o"]


GRADER = {"type": "string_check", "name": "g", "input": "{{sample.output_text}}", "reference": "{{ item.gold }}"}


def test_rft_rows_keep_what_a_grader_looks_up():
    row = {"messages": [USER], "gold": 3, "grader": {**GRADER, "operation": "eq"}}
    rft = read_rft_row(row)
    assert rft.prompt.messages == (Message("user", "q"),)
    assert (rft.item, rft.grader) == ({"gold": 3}, row["grader"])
    assert detect([(1, row)]).format == "openai_rft"
    assert not READERS["openai_rft"].has_answers


HARMONY = (
    "<|start|>system<|message|>You are Ada.\n\nReasoning: high\n\n# Valid channels: analysis, final.<|end|>"
    "<|start|>developer<|message|># Tools\n\n## functions\n\nnamespace functions {\n\ntype f = () => any;\n\n}<|end|>"
    "<|start|>user<|message|>q<|end|>"
    "<|start|>assistant to=functions.f<|channel|>commentary <|constrain|>json<|message|>{}<|call|>"
    "<|start|>functions.f to=assistant<|channel|>commentary<|message|>r<|end|>"
    "<|start|>assistant<|channel|>final<|message|>a<|return|>"
)


def test_harmony_text_is_kept_to_the_letter_but_for_the_order_in_a_calls_header():
    conversation = read("harmony", text=HARMONY)
    channel_first = HARMONY.replace(
        "assistant to=functions.f<|channel|>commentary <", "assistant<|channel|>commentary to=functions.f <"
    )
    assert rendered(conversation)[-1] == channel_first
    assert rendered(read("harmony", text=channel_first)) == rendered(conversation)
    assert conversation.reasoning_effort == "high"


def tool_result(content):
    """A row with a result as tables may hold it."""
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}
    return {"messages": [USER, call, {"role": "tool", "content": content}, ANSWER]}


BAD_ROWS = [
    ("openai_chat", {"messages": [USER, {**ANSWER, "refusal": "x"}]}, "messages[1].refusal: stands beside `content`"),
    ("openai_chat", {"messages": [USER, ANSWER], "tools": [], "functions": []}, "functions: is deprecated"),
    ("openai_chat", {"messages": [USER, ANSWER], "parallel_tool_calls": "yes"}, "parallel_tool_calls: must be true"),
    ("messages", {"messages": [USER, {**ANSWER, "function_call": {"name": "f"}}]}, "name data.format=openai_chat"),
    ("openai_responses", {"items": [{"type": "web_search_call"}]}, "items[0].type: 'web_search_call' items cannot"),
    ("openai_responses", {"items": [USER, {**ANSWER, "phase": "x"}]}, "items[1].phase: 'x' is not a phase"),
    (
        "openai_responses",
        {"items": [USER, {"type": "reasoning"}, {"type": "reasoning", "content": [{"type": "text"}]}]},
        "items[2].content[0].type: 'text' cannot be reasoning",
    ),
    (
        "openai_responses",
        {"items": [{"type": "reasoning", "content": [{"type": "reasoning_text", "text": "t"}]}, USER, ANSWER]},
        "items[1]: comes after reasoning that led to no message",
    ),
    ("preference", {"chosen": "a", "rejected": "b"}, "prompt: is absent"),
    ("preference", {"prompt": "q", "chosen": [USER], "rejected": "b"}, "chosen: must begin with the assistant"),
    ("preference", {"prompt": "q", "chosen": "a", "rejected": 3}, "rejected: must be a list, not int"),
    (
        "preference",
        {"prompt": "other", "chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "b"}]},
        "prompt: is not what `chosen` and `rejected` begin with",
    ),
    (
        "preference",
        {"prompt": "q", "chosen": [USER, ANSWER], "rejected": [{**USER, "content": "r"}, ANSWER]},
        "rejected: must begin with the assistant or, after a prompt, as `chosen` does",
    ),
    ("openai_preference", {"input": [], "preferred_output": []}, "input: must be a JSON object, not list"),
    (
        "openai_preference",
        {"input": {"messages": [{"role": "x"}]}, "preferred_output": [ANSWER]},
        "input.messages[0].role: 'x' is not a role",
    ),
    (
        "openai_preference",
        {"input": {"messages": [USER]}, "preferred_output": [ANSWER]},
        "non_preferred_output: must be a list, not absent",
    ),
    ("prompt_completion", {"prompt": "<|start|>user", "completion": "a"}, "prompt: is rendered harmony"),
    ("prompt_completion", {"prompt": "q", "completion": ""}, "completion: is empty"),
    ("prompt_completion", {"prompt": "q", "completion": "a", "label": 1}, "label: must be true"),
    ("sharegpt", {"conversations": [{"from": "bot", "value": "x"}]}, "conversations[0].from: 'bot' is no speaker"),
    ("sharegpt", {"conversations": [{"from": "human", "value": "x"}]}, "conversations: has no assistant message"),
    (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "nope"}]},
        "conversations[1].value: is not JSON",
    ),
    ("alpaca", {"instruction": "i", "output": "o", "history": [["a"]]}, "history[0]: must be a pair"),
    ("alpaca", {"instruction": "i", "output": ""}, "output: an assistant message needs content"),
    ("multilingual_thinking", {"user": "q", "analysis": "t", "final": None}, "final: an assistant message needs"),
    ("openai_rft", {"messages": [USER, ANSWER]}, "messages: must end with the user"),
    ("openai_rft", {"messages": [USER], "grader": {"type": "vibes"}}, "grader.type: 'vibes' is not a grader"),
    ("openai_rft", {"messages": [USER], "grader": GRADER}, "grader.operation: is absent"),
    (
        "openai_rft",
        {"messages": [USER], "grader": {**GRADER, "operation": "eq"}},
        "grader.reference: {{item.gold}} looks up `gold`, which the row does not have",
    ),
    (
        "openai_rft",
        {"messages": [USER], "grader": {"type": "multi", "graders": {"a": {"type": "x"}}, "calculate_output": "a"}},
        "grader.graders.a.type: 'x' is not a grader",
    ),
    (
        "openai_responses",
        {"items": [USER, ANSWER, THOUGHT]},
        "items[2]: is the end of reasoning that led to no message",
    ),
    ("openai_responses", {"items": [THOUGHT, USER, ANSWER]}, "items[1]: comes after reasoning that led to no message"),
    ("harmony", {"text": "hello"}, "text: message 0 is not <|start|>header"),
    ("harmony", {"text": "<|start|>user<|message|>q<|start|>x<|message|>y<|end|>"}, "text: message 0 is not"),
    ("harmony", {"text": "<|start|>user to=<|message|>q<|end|>"}, "text: message 0 has a header that is not harmony's"),
    (
        "harmony",
        {"text": "<|start|>assistant<|channel|>x<|message|>y<|end|>"},
        "message 0 (assistant) is on channel 'x'",
    ),
    (
        "harmony",
        {"text": "<|start|>assistant to=f<|channel|>commentary<|message|>{}<|end|>"},
        "message 0 ends in <|end|> with a recipient",
    ),
    ("harmony", {"text": "<|start|>user<|message|>q<|end|>"}, "text: has no assistant message"),
    ("messages", {"messages": [USER, {**ANSWER, "content": "a\ud800"}]}, "messages[1].content: character 2 is half of"),
    ("messages", {"messages": [{**USER, "content": " " * 100_000}, ANSWER]}, "messages[0].content: has 100000 white-"),
    (
        "messages",
        {"messages": [USER, ANSWER], "tools": [{"name": "f", "parameters": {"default": float("nan")}}]},
        "tools[0].parameters.default: nan is not JSON",
    ),
    (
        "messages",
        {"messages": [USER, ANSWER], "tools": [{"name": "f", "parameters": {"maximum": 10**400}}]},
        "tools[0].parameters.maximum: the number is too large",
    ),
    ("messages", tool_result({"a": "\ud800"}), "messages[2].content.a: character 1 is half of a surrogate pair"),
    ("messages", tool_result({"a": " " * 1_000_000}), "messages[2].content.a: has 100000 white-space"),
    ("messages", tool_result({"a": [1.0, float("inf")]}), "messages[2].content.a[1]: inf is not JSON"),
    ("messages", tool_result({"a": date(2025, 6, 28)}), "messages[2].content.a: date has no place in JSON"),
    (
        "messages",
        {"messages": [USER, {**ANSWER, "weight": 1e300}]},
        "messages[1].weight: must be 0 (no loss on this message) or a number up to 1,000,000",
    ),
]


@pytest.mark.parametrize(("format", "row", "message"), BAD_ROWS)
def test_faults_are_named_by_field(format, row, message):
    with pytest.raises(UserError) as caught:
        READERS[format].read(row)
    assert message in str(caught.value)


def test_the_reason_for_a_format_is_given():
    rows = [(1, {"messages": [USER, ANSWER]}), (4, {"messages": [USER, {**ANSWER, "weight": 0}]})]
    assert str(detect(rows)) == "format openai_chat, because it has `messages` and OpenAI's `weight` (line 4)"
    assert "only the preferred answer is learned" in str(detect([(1, {"prompt": "q", "chosen": "a", "rejected": "b"})]))
    strings = [(1, {"messages": json.dumps([USER])})]
    assert detect(strings).format == "openai_rft"
    assert detect([*strings, *rows]).format == "openai_chat"


def test_unknown_and_mixed_formats_are_errors():
    with pytest.raises(UserError, match="no known row format has these columns: 'question', 'reply'; rename them"):
        detect([(1, {"question": "q", "reply": "a"})])
    with pytest.raises(UserError, match=r"rows of different formats: messages in line 1, alpaca in line 2; split"):
        detect([(1, {"messages": [USER, ANSWER]}), (2, {"instruction": "i", "output": "o"})])


def test_a_cyclic_reference_in_a_schema_is_just_any():
    parameters = {"type": "object", "properties": {"x": {"$ref": "#"}}}
    row = {"messages": [USER, ANSWER], "tools": [{"name": "f", "parameters": parameters}]}
    assert "x?: any" in rendered(READERS["messages"].read(row))[0]
