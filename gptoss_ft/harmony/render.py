"""Token ids of a conversation, equal to openai-harmony's but for a call's header and `# Response Formats`.

A call's header names the channel first (`<|channel|>commentary to=functions.x <|constrain|>json`), the order the
models themselves write; openai-harmony parses both orders but can render only the other. Response formats are in
OpenAI's guide to harmony, and openai-harmony does not render them at all.
"""

from collections.abc import Sequence
from functools import lru_cache

from gptoss_ft.harmony.conversation import CHANNELS, FUNCTIONS, Conversation, Message, ResponseFormat, Tool
from gptoss_ft.harmony.tools import builtin_tools_section, response_formats_section, tools_section
from gptoss_ft.harmony.vocabulary import CALL, CHANNEL, CONSTRAIN, END, MESSAGE, START, encode

CHANNELS_LINE = f"# Valid channels: {', '.join(CHANNELS)}. Channel must be included for every message."
CALLS_LINE = f"Calls to these tools must go to the commentary channel: '{FUNCTIONS}'."


def opening_ids(conversation: Conversation) -> list[int]:
    """Ids of the system message and, if it has anything to say, of the developer message."""
    system, developer = conversation.verbatim_system, conversation.verbatim_developer
    if system is None:
        system = system_text(conversation)
        developer = developer_text(conversation.instructions, conversation.tools, conversation.response_formats)
    ids = [START, *_encode_once("system"), MESSAGE, *_encode_once(system), END]
    if developer:
        ids += [START, *_encode_once("developer"), MESSAGE, *_encode_once(developer), END]
    return ids


def message_ids(message: Message) -> list[int]:
    """Ids of one message as history holds it: `<|start|>` to `<|call|>` for a call, to `<|end|>` for any other."""
    text = developer_text(message.content) if message.role == "developer" else message.content
    return [START, *_header_ids(message), MESSAGE, *encode(text), CALL if message.is_call else END]


def channel_choice(message: Message, ids: Sequence[int]) -> range:
    """Where among a message's `ids` its channel is chosen: `<|channel|>` and the channel's name."""
    if message.channel is None:
        return range(0)
    start = ids.index(CHANNEL)
    return range(start, start + 1 + len(_encode_once(message.channel)))


def generation_prompt() -> list[int]:
    """Ids of `<|start|>assistant`, from which the model goes on."""
    return [START, *_encode_once("assistant")]


def system_text(conversation: Conversation) -> str:
    facts = (
        ("", conversation.model_identity),
        ("Knowledge cutoff: ", conversation.knowledge_cutoff),
        ("Current date: ", conversation.conversation_start_date),
    )
    lines = [label + value for label, value in facts if value is not None]
    sections = ["\n".join(lines)] if lines else []
    sections.append(f"Reasoning: {conversation.reasoning_effort}")
    if conversation.builtin_tools:
        sections.append(builtin_tools_section(conversation.builtin_tools))
    sections.append(f"{CHANNELS_LINE}\n{CALLS_LINE}" if conversation.tools else CHANNELS_LINE)
    return "\n\n".join(sections)


def developer_text(
    instructions: str | None, tools: Sequence[Tool] = (), response_formats: Sequence[ResponseFormat] = ()
) -> str:
    sections = [] if instructions is None else [f"# Instructions\n\n{instructions}"]
    if tools:
        sections.append(tools_section(tools))
    if response_formats:
        sections.append(response_formats_section(response_formats))
    return "\n\n".join(sections)


def _header_ids(message: Message) -> list[int]:
    # Text between control tokens is encoded piece by piece, as openai-harmony does.
    recipient = [] if message.recipient is None else [*_encode_once(f" to={message.recipient}")]
    channel = [] if message.channel is None else [CHANNEL, *_encode_once(message.channel)]
    content_type = []
    if message.content_type is not None and message.constrained:
        content_type = [*_encode_once(" "), CONSTRAIN, *_encode_once(message.content_type)]
    elif message.content_type is not None:
        content_type = [*_encode_once(f" {message.content_type}")]
    routing = channel + recipient if message.is_call else recipient + channel
    return [*_author_ids(message), *routing, *content_type]


def _author_ids(message: Message) -> tuple[int, ...]:
    """A tool goes by its name alone; anyone else by role and, if there is one, name."""
    if message.role == "tool":
        if message.name is None:
            raise ValueError("a tool message needs the tool's name, such as functions.get_weather")
        return _encode_once(message.name)
    name = () if message.name is None else _encode_once(f":{message.name}")
    return _encode_once(message.role) + name


@lru_cache(maxsize=1024)
def _encode_once(text: str) -> tuple[int, ...]:
    """Cached ids of the texts that recur from row to row: headers, system messages, blocks of tools."""
    return tuple(encode(text))
