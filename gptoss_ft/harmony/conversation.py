"""A conversation in harmony's own terms; every row format is read into this, and only this is rendered."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["developer", "user", "assistant", "tool"]
Channel = Literal["analysis", "commentary", "final"]
ReasoningEffort = Literal["low", "medium", "high"]

REASONING_EFFORTS: tuple[ReasoningEffort, ...] = ("low", "medium", "high")
DEFAULT_IDENTITY = "You are ChatGPT, a large language model trained by OpenAI."
FUNCTIONS = "functions"


@dataclass(frozen=True)
class Tool:
    """A function the assistant may call; `parameters` is a JSON Schema object, None for a function without any."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Message:
    """One `<|start|>...` block.

    `name` is the tool's full name (`functions.x`) where the role is "tool". `recipient` makes an assistant
    message a call. `content_type` is written after `<|constrain|>`. A message of weight 0 gives no loss.
    """

    role: Role
    content: str
    channel: Channel | None = None
    recipient: str | None = None
    content_type: str | None = None
    name: str | None = None
    weight: float = 1.0

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


@dataclass(frozen=True)
class Conversation:
    """Messages, and what the system and developer messages before them say.

    `conversation_start_date` (YYYY-MM-DD) is left out of the prompt unless set, as a date that changes daily
    would make training data irreproducible.
    """

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    instructions: str | None = None
    reasoning_effort: ReasoningEffort = "medium"
    knowledge_cutoff: str | None = "2024-06"
    conversation_start_date: str | None = None
    model_identity: str | None = DEFAULT_IDENTITY
