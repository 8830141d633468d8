import pytest

from gptoss_ft.harmony.conversation import Conversation, Message, ResponseFormat, Tool
from gptoss_ft.harmony.generations import generation_prompt_ids
from gptoss_ft.harmony.render import developer_text, message_ids, opening_ids, system_text
from gptoss_ft.harmony.vocabulary import decode

WEATHER = Tool(
    name="get_weather",
    description="Current weather.\nOf one place.",
    parameters={
        "type": "object",
        "properties": {
            "place": {"type": "string", "description": "City, country"},
            "unit": {"type": "string", "enum": ["c", "f"], "default": "c"},
            "days": {"type": "array", "items": {"type": "integer"}},
            "at": {"type": "object", "properties": {"lat": {"type": "number"}}, "required": ["lat"]},
            "when": {"oneOf": [{"type": "string", "description": "a date"}, {"type": "integer", "default": 0}]},
            "tolerance": {"type": ["number", "null"], "default": 1e-5},
        },
        "required": ["place"],
    },
)

EXPECTED_PROMPT = """\
<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.
Knowledge cutoff: 2024-06

Reasoning: high

# Valid channels: analysis, commentary, final. Channel must be included for every message.
Calls to these tools must go to the commentary channel: 'functions'.<|end|>\
<|start|>developer<|message|># Instructions

Be brief.

# Tools

## functions

namespace functions {

// Current weather.
// Of one place.
type get_weather = (_: {
// City, country
place: string,
unit?: "c" | "f", // default: c
days?: number[],
at?: {
    lat: number,
    },
when?:
 | string // a date
 | number // default: 0
,
tolerance?: number | null, // default: 0.00001
}) => any;

type now = () => any;

} // namespace functions<|end|>\
<|start|>user<|message|>Rain?<|end|><|start|>assistant"""


def test_whole_prompt():
    conversation = Conversation(
        messages=(Message("user", "Rain?"),),
        tools=(WEATHER, Tool("now")),
        instructions="Be brief.",
        reasoning_effort="high",
    )
    assert decode(generation_prompt_ids(conversation)) == EXPECTED_PROMPT


def test_date_only_if_set():
    dated = Conversation(messages=(), conversation_start_date="2025-06-28")
    assert "Knowledge cutoff: 2024-06\nCurrent date: 2025-06-28\n\nReasoning: medium" in system_text(dated)
    assert "Current date" not in system_text(Conversation(messages=()))


def test_no_developer_message_without_instructions_and_tools():
    assert "developer" not in decode(generation_prompt_ids(Conversation(messages=(Message("user", "hi"),))))


def test_headers():
    call = Message("assistant", "{}", "commentary", "functions.f", "json")
    result = Message("tool", "1", "commentary", "assistant", name="functions.f")
    assert decode(message_ids(call)) == (
        "<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>"
    )
    assert decode(message_ids(result)) == ("<|start|>functions.f to=assistant<|channel|>commentary<|message|>1<|end|>")
    assert decode(message_ids(Message("user", "hi", name="bob"))) == "<|start|>user:bob<|message|>hi<|end|>"


def test_a_tool_message_needs_a_name():
    with pytest.raises(ValueError, match="needs the tool's name"):
        message_ids(Message("tool", "1"))


def test_union_description_above_or_beside_never_twice():
    def rendered(description, first):
        variants = [{"type": "string", "description": first}, {"type": "integer"}]
        schema = {"type": "object", "properties": {"a": {"description": description, "oneOf": variants}}}
        return developer_text(None, [Tool("f", "", schema)])

    assert "// id\na?:\n | string\n | number\n,\n" in rendered("id", "a name")
    assert "(_: {\na?:\n | string\n | number\n,\n" in rendered("id", "id")


def test_response_formats_end_the_developer_message():
    formats = (ResponseFormat("answer", {"type": "object", "properties": {"naïve": {}}}, "What to say.\nNo more."),)
    assert developer_text("Be brief.", [Tool("now")], formats) == (
        "# Instructions\n\nBe brief.\n\n# Tools\n\n## functions\n\nnamespace functions {\n\ntype now = () => any;\n\n"
        "} // namespace functions\n\n# Response Formats\n\n## answer\n\n// What to say.\n// No more.\n"
        '{"type":"object","properties":{"naïve":{}}}'
    )


def test_verbatim_texts_replace_the_rest_of_the_opening():
    asked = Conversation((), tools=(WEATHER,), verbatim_system="Hello.", verbatim_developer="Be brief.")
    assert decode(opening_ids(asked)) == (
        "<|start|>system<|message|>Hello.<|end|><|start|>developer<|message|>Be brief.<|end|>"
    )
    alone = Conversation((), tools=(WEATHER,), verbatim_system="Hello.")
    assert decode(opening_ids(alone)) == "<|start|>system<|message|>Hello.<|end|>"
