"""A conversation in harmony's own terms; every row format is read into this, and only this is rendered."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["developer", "user", "assistant", "tool"]
Channel = Literal["analysis", "commentary", "final"]
ReasoningEffort = Literal["low", "medium", "high"]
BuiltinTool = Literal["browser", "python"]

CHANNELS: tuple[Channel, ...] = ("analysis", "commentary", "final")
REASONING_EFFORTS: tuple[ReasoningEffort, ...] = ("low", "medium", "high")
DEFAULT_IDENTITY = "You are ChatGPT, a large language model trained by OpenAI."
DEFAULT_KNOWLEDGE_CUTOFF = "2024-06"
FUNCTIONS = "functions"


@dataclass(frozen=True)
class Tool:
    """A function the assistant may call; `parameters` is a JSON Schema object, None for a function without any."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class ResponseFormat:
    """A shape that answers may have to take; `schema` is a JSON Schema."""

    name: str
    schema: Mapping[str, Any]
    description: str = ""


@dataclass(frozen=True)
class Message:
    """One `<|start|>...` block.

    `name` is the tool's full name (`functions.x`, `browser.search`, `python`) where the role is "tool", and follows
    the role elsewhere. `recipient` makes an assistant message a call: to a function on the commentary channel, to a
    built-in tool on the analysis channel. `content_type` is written behind `<|constrain|>` if `constrained` (a
    function's "json"), else plainly (a built-in tool's "code"). `weight` multiplies the loss of every token of the
    message; 0 gives none.
    """

    role: Role
    content: str
    channel: Channel | None = None
    recipient: str | None = None
    content_type: str | None = None
    name: str | None = None
    weight: float = 1.0
    constrained: bool = True

    @property
    def is_call(self) -> bool:
        return self.role == "assistant" and self.recipient is not None

    @property
    def is_final(self) -> bool:
        return self.role == "assistant" and self.channel == "final"

    @property
    def is_reasoning(self) -> bool:
        """Chain of thought proper: a built-in tool's call on the analysis channel is not."""
        return self.role == "assistant" and self.channel == "analysis" and self.recipient is None

    @property
    def is_preamble(self) -> bool:
        """What the assistant tells the user before it calls a tool."""
        return self.role == "assistant" and self.channel == "commentary" and self.recipient is None


@dataclass(frozen=True)
class Conversation:
    """Messages, and what the system and developer messages before them say.

    `conversation_start_date` (YYYY-MM-DD) is left out of the prompt unless set, as a date that changes daily
    would make training data irreproducible. The `verbatim_` texts replace what the other fields would make of the
    system message and of the developer message behind it; raw harmony text is kept so.
    """

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    instructions: str | None = None
    reasoning_effort: ReasoningEffort = "medium"
    knowledge_cutoff: str | None = DEFAULT_KNOWLEDGE_CUTOFF
    conversation_start_date: str | None = None
    model_identity: str | None = DEFAULT_IDENTITY
    builtin_tools: tuple[BuiltinTool, ...] = ()
    response_formats: tuple[ResponseFormat, ...] = ()
    verbatim_system: str | None = None
    verbatim_developer: str | None = None
