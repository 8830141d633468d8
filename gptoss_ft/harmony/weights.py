"""How much each thing that the assistant writes counts in the loss."""

from dataclasses import dataclass
from typing import Literal

from gptoss_ft.harmony.conversation import Message

LossPolicy = Literal["all", "last_turn", "final_only", "no_reasoning", "tool_calls_only"]
MissingReasoning = Literal["keep", "low_effort", "mask_channel", "drop"]


@dataclass(frozen=True)
class LossRules:
    """Weights of a completion's messages; each applies to the whole message, from its header to its stop token.

    A message's weight is its own, times that of its channel, times 0 if the policy or `preambles` leaves it out.

    Attributes:
        policy: `all` that the assistant writes; `last_turn`, what it writes after the last user message; `final_only`,
            answers on the final channel; `no_reasoning`, all but the chain of thought; `tool_calls_only`.
        preambles: whether what the assistant says to the user before a call counts.
        missing_reasoning: for generations that no chain of thought leads to, which teach the model to answer without
            one: `keep` them; `low_effort` asks for them with `Reasoning: low` (but in verbatim text); `mask_channel` has no loss on the
            channel that the completion opens with, where the choice not to think is made; `drop` has none at all.
    """

    policy: LossPolicy = "all"
    analysis: float = 1.0
    commentary: float = 1.0
    final: float = 1.0
    preambles: bool = True
    missing_reasoning: MissingReasoning = "keep"

    def weight(self, message: Message, *, in_last_turn: bool) -> float:
        """Weight of an assistant's message; `in_last_turn` if no user message follows it."""
        if not self._counts(message, in_last_turn) or (message.is_preamble and not self.preambles):
            return 0.0
        channels = {"analysis": self.analysis, "commentary": self.commentary, "final": self.final}
        return message.weight * channels.get(message.channel or "", 1.0)

    def _counts(self, message: Message, in_last_turn: bool) -> bool:
        match self.policy:
            case "all":
                return True
            case "last_turn":
                return in_last_turn
            case "final_only":
                return message.is_final
            case "no_reasoning":
                return not message.is_reasoning
            case "tool_calls_only":
                return message.is_call
