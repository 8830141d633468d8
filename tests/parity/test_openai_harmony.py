"""Our token ids against openai-harmony's: equal, but for the order inside a call's header and response formats."""

import json
from dataclasses import replace
from functools import partial
from importlib.resources import files
from itertools import chain

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from gptoss_ft.data.schemas.messages import read_messages_row
from gptoss_ft.harmony.conversation import CHANNELS, REASONING_EFFORTS, Conversation, Message, ResponseFormat, Tool
from gptoss_ft.harmony.generations import generation_prompt_ids, generations
from gptoss_ft.harmony.render import developer_text, message_ids, opening_ids
from gptoss_ft.harmony.vocabulary import CALL, RETURN, SPECIAL_TOKENS, decode, encode

openai_harmony = pytest.importorskip("openai_harmony")
Role = openai_harmony.Role
dumps = partial(json.dumps, ensure_ascii=False)

relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
many = settings(relaxed, max_examples=300)

# Plain text, text full of control tokens, and line ends that a splitter may take differently.
texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=60),
    st.lists(st.sampled_from([*SPECIAL_TOKENS, " ", "assistant", "x"]), max_size=5).map("".join),
    st.lists(st.sampled_from(["a", "\n", "\r\n", "\r", "\u2028", "\x0c", " "]), max_size=8).map("".join),
)
names = st.from_regex(r"[A-Za-z0-9_-]{1,12}", fullmatch=True)
# Those that a table of round numbers would miss: openai-harmony does not read 16 digits and more exactly.
floats = st.sampled_from([1e-5, 1e16, -0.0, 0.1, 1.5e20]) | st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | floats | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=4,
)
TYPES = ["string", "number", "integer", "boolean", "object", "array", "null", "tuple"]


def schemas_of(inner):
    optional = {
        "type": st.sampled_from(TYPES) | st.lists(st.sampled_from(TYPES), max_size=3),
        "title": texts,
        "description": st.sampled_from(["same", "other"]) | texts,
        "default": json_values,
        "enum": st.lists(texts | st.integers(), max_size=3),
        "examples": st.lists(texts | st.integers(), max_size=2),
        "nullable": st.booleans(),
        "oneOf": st.lists(inner, max_size=3),
        "anyOf": st.lists(inner, max_size=2),
        "allOf": st.lists(inner, max_size=2),
        "const": json_values,
        "$ref": st.just("#/$defs/node"),
        "items": inner,
    }
    objects = {
        "type": st.just("object"),
        "properties": st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
        "required": st.lists(st.sampled_from("abc"), max_size=2),
    }
    return st.fixed_dictionaries({}, optional=optional) | st.fixed_dictionaries(
        objects, optional={"description": texts}
    )


schemas = st.recursive(
    st.booleans() | st.fixed_dictionaries({"type": st.sampled_from(TYPES)}), schemas_of, max_leaves=8
)
objects = schemas_of(schemas)
tools = st.lists(st.builds(Tool, names, texts, st.none() | objects), max_size=3).map(tuple)


@st.composite
def turns(draw):
    """What one exchange adds: a question, calls and their results, an answer; thinking may be anywhere."""
    messages = [Message("user", draw(texts), name=draw(st.none() | names))]
    if draw(st.booleans()):
        messages.insert(0, Message("developer", draw(texts)))
    for _ in range(draw(st.integers(0, 2))):
        call = draw(calls)
        messages += [*draw(thinking), *draw(preambles), call]
        if draw(st.booleans()):
            messages.append(Message("tool", draw(texts), call.channel, "assistant", name=call.recipient))
    return messages + draw(thinking) + [Message("assistant", draw(texts), "final")]


thinking = st.lists(st.builds(Message, st.just("assistant"), texts, st.just("analysis")), max_size=1)
preambles = st.lists(st.builds(Message, st.just("assistant"), texts, st.just("commentary")), max_size=1)
functions = names.map("functions.{}".format)
calls = st.builds(Message, st.just("assistant"), texts, st.just("commentary"), functions, st.just("json")) | st.builds(
    Message,
    st.just("assistant"),
    texts,
    st.just("analysis"),
    st.sampled_from(["python", "browser.search", "browser.open", "browser.find"]),
    st.none() | st.just("code"),
    constrained=st.just(False),
)
messages = st.builds(
    Message,
    st.sampled_from(["user", "assistant", "developer"]),
    texts,
    st.none() | st.sampled_from(CHANNELS),
    st.none() | st.sampled_from(["assistant", "python", "functions.f"]),
    st.none() | st.sampled_from(["json", "code"]),
    st.none() | names,
    constrained=st.booleans(),
) | st.builds(Message, st.just("tool"), texts, st.none() | st.sampled_from(CHANNELS), name=functions)
conversations = st.builds(
    Conversation,
    messages=st.lists(turns(), min_size=1, max_size=3).map(lambda parts: tuple(chain.from_iterable(parts))),
    tools=tools,
    instructions=st.none() | texts,
    reasoning_effort=st.sampled_from(REASONING_EFFORTS),
    knowledge_cutoff=st.none() | texts,
    conversation_start_date=st.none() | st.just("2025-06-28"),
    model_identity=st.none() | texts,
    builtin_tools=st.lists(st.sampled_from(["python", "browser"]), unique=True).map(tuple),
)


def theirs(message: Message):
    content = message.content
    if message.role == "developer":
        content = openai_harmony.DeveloperContent.new().with_instructions(content)
    author = openai_harmony.Author(role=Role(message.role), name=message.name)
    their = openai_harmony.Message.from_author_and_content(author, content)
    their.channel, their.recipient = message.channel, message.recipient
    their.content_type = message.content_type
    if message.content_type and message.constrained:
        their.content_type = f"<|constrain|>{message.content_type}"
    return their


def their_opening(conversation: Conversation):
    system = openai_harmony.SystemContent(
        model_identity=conversation.model_identity,
        reasoning_effort=openai_harmony.ReasoningEffort(conversation.reasoning_effort.capitalize()),
        conversation_start_date=conversation.conversation_start_date,
        knowledge_cutoff=conversation.knowledge_cutoff,
    )
    if "browser" in conversation.builtin_tools:
        system = system.with_browser_tool()
    if "python" in conversation.builtin_tools:
        system = system.with_python_tool()
    messages = [openai_harmony.Message.from_role_and_content(Role.SYSTEM, system)]
    if conversation.instructions is not None or conversation.tools:
        developer = openai_harmony.DeveloperContent(instructions=conversation.instructions)
        if conversation.tools:
            described = [openai_harmony.ToolDescription(**vars(tool)) for tool in conversation.tools]
            developer = developer.with_function_tools(described)
        messages.append(openai_harmony.Message.from_role_and_content(Role.DEVELOPER, developer))
    return messages


def their_prompt(encoding, conversation: Conversation, history: list[Message]) -> list[int]:
    """openai-harmony's prompt for a history that holds no call; it drops nothing."""
    messages = their_opening(conversation) + [theirs(message) for message in history]
    return encoding.render_conversation_for_completion(
        openai_harmony.Conversation.from_messages(messages),
        Role.ASSISTANT,
        openai_harmony.RenderConversationConfig(auto_drop_analysis=False),
    )


def assert_samples_agree(encoding, conversation: Conversation) -> None:
    """Prompts are openai-harmony's; completions parse back to the conversation's assistant messages, once each."""
    opening = their_prompt(encoding, conversation, [])[:-2]
    answered = []
    for sample in generations(conversation):
        parsed = encoding.parse_messages_from_completion_tokens(sample.completion_ids, Role.ASSISTANT)
        answered += [comparable(message) for message in parsed]
        before = position_of_answer(conversation.messages, len(answered) - len(parsed))
        history = history_by_the_guide(conversation.messages[:before])
        prompt = list(opening)
        for message in history:
            prompt += message_ids(message) if message.is_call else encoding.render(theirs(message))
        assert sample.prompt_ids == [*prompt, *encoding.encode("<|start|>assistant", allowed_special="all")]
        if not any(message.is_call for message in history):
            assert sample.prompt_ids == their_prompt(encoding, conversation, history)
        assert sample.completion_ids[-1] in encoding.stop_tokens_for_assistant_actions()
    assert answered == [comparable(theirs(m)) for m in conversation.messages if m.role == "assistant"]


def position_of_answer(messages, count: int) -> int:
    """Position of the assistant message number `count`."""
    return [position for position, message in enumerate(messages) if message.role == "assistant"][count]


def history_by_the_guide(messages) -> list[Message]:
    """OpenAI's guide: thinking goes once a final answer has followed it."""
    finals = [position for position, message in enumerate(messages) if message.channel == "final"]
    return [m for position, m in enumerate(messages) if m.channel != "analysis" or not finals or position > finals[-1]]


def comparable(message) -> tuple:
    return message.author.role, message.channel, message.recipient, message.content_type, message.content[0].text


@many
@given(texts)
def test_text_has_the_same_ids(openai_encoding, text):
    assert encode(text) == openai_encoding.encode(text, disallowed_special=())


@many
@given(objects)
def test_tools_read_the_same(openai_encoding, parameters):
    tool = Tool("f", "first line\nsecond line", parameters)
    developer = openai_harmony.DeveloperContent.new().with_function_tools(
        [openai_harmony.ToolDescription.new(tool.name, tool.description, parameters)]
    )
    message = openai_harmony.Message.from_role_and_content(Role.DEVELOPER, developer)
    assert (
        decode(openai_encoding.render(message)) == f"<|start|>developer<|message|>{developer_text(None, [tool])}<|end|>"
    )


@many
@given(conversations)
def test_opening_has_the_same_ids(openai_encoding, conversation):
    assert opening_ids(conversation) == their_prompt(openai_encoding, conversation, [])[:-2]


@many
@given(messages)
def test_any_message_but_a_call_has_the_same_ids(openai_encoding, message):
    assume(not message.is_call)
    assert message_ids(message) == openai_encoding.render(theirs(message))


@many
@given(calls)
def test_call_names_the_channel_first_and_parses_back(openai_encoding, call):
    ours, their = message_ids(call), openai_encoding.render(theirs(call))
    assert sorted(ours) == sorted(their) and ours[-1] == CALL
    content_type = {None: "", "code": " code", "json": " <|constrain|>json"}[call.content_type]
    header = f"<|start|>assistant<|channel|>{call.channel} to={call.recipient}{content_type}<|message|>"
    assert decode(ours).startswith(header)
    (parsed,) = openai_encoding.parse_messages_from_completion_tokens(ours[2:], Role.ASSISTANT)
    assert comparable(parsed) == comparable(theirs(call))


@given(st.none() | texts, tools, names, texts)
def test_response_formats_follow_what_openai_harmony_makes_of_the_rest(
    openai_encoding, instructions, tools, name, text
):
    formats = (ResponseFormat(name, {"type": "object", "title": text}), ResponseFormat("other", {}))
    asked = Conversation(messages=(), instructions=instructions, tools=tools, response_formats=formats)
    rest = decode(their_prompt(openai_encoding, replace(asked, response_formats=()), [])[:-2])
    section = (
        f"""# Response Formats\n\n## {name}\n\n{{"type":"object","title":{dumps(text)}}}\n\n## other\n\n{{}}<|end|>"""
    )
    alone = instructions is None and not tools
    before = f"{rest}<|start|>developer<|message|>" if alone else rest.removesuffix("<|end|>") + "\n\n"
    assert decode(opening_ids(asked)) == before + section


@many
@given(conversations)
def test_generations_of_any_conversation(openai_encoding, conversation):
    assert_samples_agree(openai_encoding, conversation)


@pytest.mark.slow
@settings(relaxed, max_examples=2000)
@given(conversations)
def test_thousands_of_conversations(openai_encoding, conversation):
    assert opening_ids(conversation) == their_prompt(openai_encoding, conversation, [])[:-2]
    assert_samples_agree(openai_encoding, conversation)


@relaxed
@given(conversations)
def test_target_of_the_last_answer_is_its_history_but_for_the_stop_token(openai_encoding, conversation):
    last = generations(conversation)[-1]
    assert last.completion_ids[-1] == RETURN
    extended = replace(conversation, messages=(*conversation.messages, Message("user", "more")))
    final = openai_encoding.render(theirs(conversation.messages[-1]))
    question = openai_encoding.render(theirs(Message("user", "more")))
    assert generation_prompt_ids(extended)[:-2][-len(final + question) :] == final + question


@pytest.mark.parametrize("name", ["function_calls", "arithmetic"])
def test_generations_of_every_quickstart_row(openai_encoding, name):
    rows = (files("gptoss_ft") / f"assets/quickstart/{name}.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 200
    for row in rows:
        assert_samples_agree(openai_encoding, read_messages_row(json.loads(row)))


@pytest.mark.parametrize("value", [2**64 - 1, 2**64, -(2**63) - 1, 31357893381667125248, 10**30 + 1])
def test_numbers_beyond_64_bits_are_rounded_alike(openai_encoding, value):
    schema = {"type": "object", "properties": {"a": {"type": "number", "default": value}}}
    asked = Conversation(messages=(Message("user", "q"),), tools=(Tool("f", "", schema),))
    assert opening_ids(asked) == their_prompt(openai_encoding, asked, [])[:-2]
