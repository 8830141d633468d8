"""What one row holds and would teach, in numbers small enough to send between processes."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from gptoss_ft.data.spans import spans
from gptoss_ft.harmony.conversation import FUNCTIONS, Conversation, Message
from gptoss_ft.harmony.generations import Generation, generations
from gptoss_ft.harmony.weights import LossRules

# Spelled out in a text they are learned as plain characters, which no model should write.
TEMPLATE_TOKENS = re.compile(r"<\|[a-z_]+\|>|\[/?INST\]|</?s>|<<SYS>>|<(?:start|end)_of_turn>")
THINK_TAGS = re.compile(r"</?think(?:ing)?>")
# UTF-8 read as Latin-1 or Windows-1252, and characters that were lost.
MOJIBAKE = re.compile("\ufffd|Ã[\u0080-\u00bf]|â€[\u0080-\u20ff]|Â[\u00a0-\u00bf]")

JSON_TYPES: dict[str, Callable[[Any], bool]] = {
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: isinstance(value, int | float) and not isinstance(value, bool) and value % 1 == 0,
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, Mapping),
    "null": lambda value: value is None,
}
PROBLEMS = {
    "no_loss": "nothing in the row has loss, so it is read for nothing",
    "think_tags": "an answer holds <think> tags: its reasoning is learned as text for the user",
    "template_tokens": "a text holds another template's control tokens, which are learned as plain characters",
    "unknown_argument": "a call has an argument that its function does not declare",
    "missing_argument": "a call lacks an argument that its function requires",
    "wrong_type": "a call's argument is not of the type, or not among the values, that its function declares",
    "undeclared_call": "a function is called but no tools are declared, so the model learns to make up functions",
    "unanswered_user": "the row ends with a user message, which nothing is learned from",
    "blank_answer": "an answer is nothing but white space",
    "mojibake": "a text was decoded wrongly (such as Ã©) or has lost characters",
    "no_reasoning": "no reasoning before an answer: the model learns to answer without; see data.missing_reasoning",
    "repeated_answer": "reasoning repeats the answer word for word",
    "uncalled_tools": "tools are declared and never called",
}


@dataclass(frozen=True)
class GenerationSize:
    """Tokens of one sample, and those of them with loss."""

    tokens: int
    loss_tokens: int


@dataclass(frozen=True)
class RowMeasure:
    """One row's counts; `tokens` and `loss_tokens` go by who wrote them (`Span.kind`), summed over its samples.

    `digest` is equal for rows whose samples are equal, `answer` for rows with the same last answer.
    """

    effort: str
    generations: tuple[GenerationSize, ...]
    tokens: Counter[str]
    loss_tokens: Counter[str]
    messages: Counter[str]
    called: Counter[str]
    problems: tuple[str, ...]
    digest: int
    answer: int | None


def measure(conversation: Conversation, rules: LossRules) -> RowMeasure:
    """Count what a conversation holds.

    Raises:
        UserError: if no samples can be made of it.
    """
    samples = generations(conversation, rules)
    tokens, loss_tokens = Counter[str](), Counter[str]()
    digest = hashlib.blake2b(digest_size=8)
    for sample in samples:
        ids = [*sample.prompt_ids, *sample.completion_ids]
        weights = [*[0.0] * len(sample.prompt_ids), *sample.loss_weights]
        for span in spans(ids):
            tokens[span.kind] += span.stop - span.start
            loss_tokens[span.kind] += sum(map(bool, weights[span.start : span.stop]))
        digest.update(repr((ids, weights)).encode())
    messages = conversation.messages
    answer = next((message.content for message in reversed(messages) if message.is_final), None)
    return RowMeasure(
        effort=conversation.reasoning_effort,
        generations=tuple(map(_size, samples)),
        tokens=tokens,
        loss_tokens=+loss_tokens,
        messages=Counter(message.channel or message.role for message in messages),
        called=Counter(message.recipient for message in messages if message.is_call and message.recipient),
        problems=tuple(name for name, has in CHECKS.items() if has(conversation, samples)),
        digest=int.from_bytes(digest.digest()),
        answer=None if answer is None else _digest(answer),
    )


def _size(sample: Generation) -> GenerationSize:
    return GenerationSize(len(sample.prompt_ids) + len(sample.completion_ids), sum(map(bool, sample.loss_weights)))


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def _has_no_loss(conversation: Conversation, samples: list[Generation]) -> bool:
    return not any(any(sample.loss_weights) for sample in samples)


def _ends_with_user(conversation: Conversation, samples: list[Generation]) -> bool:
    return bool(conversation.messages) and conversation.messages[-1].role == "user"


def _has_no_reasoning(conversation: Conversation, samples: list[Generation]) -> bool:
    asked = True
    for message in conversation.messages:
        if message.role == "user":
            asked = True
        elif message.is_reasoning:
            asked = False
        elif message.is_final and asked:
            return True
    return False


def _repeats_answer(conversation: Conversation, samples: list[Generation]) -> bool:
    return any(
        first.is_reasoning and first.content.strip() == second.content.strip()
        for first, second in pairwise(conversation.messages)
    )


def _in_texts(pattern: re.Pattern[str], *, of: Callable[[Message], bool] = lambda message: True) -> Any:
    def has(conversation: Conversation, samples: list[Generation]) -> bool:
        return any(pattern.search(message.content) for message in conversation.messages if of(message))

    return has


def _calls(conversation: Conversation) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """The schema and the arguments of every function call whose schema is known."""
    schemas = {f"{FUNCTIONS}.{tool.name}": tool.parameters or {} for tool in conversation.tools}
    for message in conversation.messages:
        if message.is_call and message.recipient in schemas and message.content_type == "json":
            arguments = json.loads(message.content)
            if isinstance(arguments, dict):
                yield schemas[message.recipient], arguments


def _has_unknown_argument(conversation: Conversation, samples: list[Generation]) -> bool:
    return any(
        isinstance(schema.get("properties"), Mapping) and not arguments.keys() <= schema["properties"].keys()
        for schema, arguments in _calls(conversation)
        if not schema.get("additionalProperties")
    )


def _lacks_argument(conversation: Conversation, samples: list[Generation]) -> bool:
    return any(
        isinstance(schema.get("required"), list) and not {*map(str, schema["required"])} <= arguments.keys()
        for schema, arguments in _calls(conversation)
    )


def _has_wrong_type(conversation: Conversation, samples: list[Generation]) -> bool:
    return any(
        not _fits(value, schema["properties"].get(name))
        for schema, arguments in _calls(conversation)
        if isinstance(schema.get("properties"), Mapping)
        for name, value in arguments.items()
    )


def _fits(value: Any, schema: Any) -> bool:
    """Whether a value may have this schema, by its type and enum alone; what is inside it is not looked at."""
    if not isinstance(schema, Mapping) or (value is None and schema.get("nullable") is True):
        return True
    if isinstance(values := schema.get("enum"), list) and value not in values:
        return False
    kind = schema.get("type")
    names = kind if isinstance(kind, list) else [kind]
    # A type that is not JSON Schema's, such as Python's "float", says nothing here.
    return any(not isinstance(name, str) or name not in JSON_TYPES or JSON_TYPES[name](value) for name in names)


def _has_blank_answer(conversation: Conversation, samples: list[Generation]) -> bool:
    return any(message.is_final and not message.content.strip() for message in conversation.messages)


def _calls_undeclared(conversation: Conversation, samples: list[Generation]) -> bool:
    functions = (m for m in conversation.messages if m.is_call and (m.recipient or "").startswith(f"{FUNCTIONS}."))
    declared = conversation.tools or conversation.verbatim_developer
    return not declared and next(functions, None) is not None


def _never_calls(conversation: Conversation, samples: list[Generation]) -> bool:
    return bool(conversation.tools) and not any(message.is_call for message in conversation.messages)


CHECKS: dict[str, Callable[[Conversation, list[Generation]], bool]] = {
    "no_loss": _has_no_loss,
    "think_tags": _in_texts(THINK_TAGS, of=lambda message: message.role == "assistant"),
    "template_tokens": _in_texts(TEMPLATE_TOKENS),
    "unknown_argument": _has_unknown_argument,
    "missing_argument": _lacks_argument,
    "wrong_type": _has_wrong_type,
    "undeclared_call": _calls_undeclared,
    "unanswered_user": _ends_with_user,
    "blank_answer": _has_blank_answer,
    "mojibake": _in_texts(MOJIBAKE),
    "no_reasoning": _has_no_reasoning,
    "repeated_answer": _repeats_answer,
    "uncalled_tools": _never_calls,
}
