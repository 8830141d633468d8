"""What the model is asked and what it answers: one training sample for each time it would be sampled.

The model stops at a call or at the end of a final answer, so a conversation holds a generation for each of these.
Its prompt is the one inference would send; its completion is exactly what the model writes.

Of several calls in a row each is a generation of its own, prompted with the calls before it: a reader lays out
calls and results as a serving loop produces them (call, result, call, result), and only where the data has no
results does one call directly follow another.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from gptoss_ft.errors import UserError
from gptoss_ft.harmony.conversation import Conversation, Message
from gptoss_ft.harmony.render import channel_choice, generation_prompt, message_ids, opening_ids
from gptoss_ft.harmony.vocabulary import RETURN
from gptoss_ft.harmony.weights import LossRules

DEFAULT_RULES = LossRules()


@dataclass(frozen=True)
class Generation:
    """`completion_ids` follow `prompt_ids` directly; `loss_weights` has one weight for each completion token."""

    prompt_ids: list[int]
    completion_ids: list[int]
    loss_weights: list[float]
    index: int


def generations(conversation: Conversation, rules: LossRules = DEFAULT_RULES) -> list[Generation]:
    """One sample per assistant turn, a turn being all messages up to and including a call or a final answer.

    A final answer ends in `<|return|>` as a target and in `<|end|>` as history.

    Raises:
        UserError: if a turn ends in neither a call nor a final answer.
    """
    messages = conversation.messages
    opening = opening_ids(conversation)
    encoded = [message_ids(message) for message in messages]
    ask = generation_prompt()
    last_user = _last(messages, lambda message: message.role == "user")
    samples = []
    for index, (start, stop) in enumerate(_turns(messages)):
        missing = "keep" if _is_reasoned(messages[:stop], start) else rules.missing_reasoning
        asked = opening_ids(replace(conversation, reasoning_effort="low")) if missing == "low_effort" else opening
        kept = _kept_in_history(messages[:start])
        prompt = [*asked, *chain.from_iterable(encoded[position] for position in kept), *ask]
        completion = list(chain.from_iterable(encoded[start:stop]))
        if messages[stop - 1].is_final:
            completion[-1] = RETURN
        weights = [rules.weight(message, in_last_turn=start > last_user) for message in messages[start:stop]]
        weights = [weight for weight, ids in zip(weights, encoded[start:stop], strict=True) for _ in ids]
        if missing == "mask_channel":
            for position in channel_choice(messages[start], encoded[start]):
                weights[position] = 0.0
        elif missing == "drop":
            weights = [0.0] * len(weights)
        samples.append(Generation(prompt, completion[len(ask) :], weights[len(ask) :], index))
    return samples


def generation_prompt_ids(conversation: Conversation) -> list[int]:
    """Ids to sample the next assistant turn from: every message as history, then `<|start|>assistant`."""
    messages = conversation.messages
    history = chain.from_iterable(message_ids(messages[position]) for position in _kept_in_history(messages))
    return [*opening_ids(conversation), *history, *generation_prompt()]


def _turns(messages: Sequence[Message]) -> Iterator[tuple[int, int]]:
    """Half-open ranges of the assistant's turns."""
    start = None
    for position, message in enumerate(messages):
        if message.role != "assistant":
            if start is not None:
                break
            continue
        start = position if start is None else start
        if message.is_call or message.is_final:
            yield start, position + 1
            start = None
    if start is not None:
        raise UserError(
            f"the assistant's turn at harmony message {start} ends in neither a call nor a final answer: "
            "the model would never learn to stop there"
        )


def _kept_in_history(messages: Sequence[Message]) -> list[int]:
    """Positions that a prompt keeps: all but the analysis channel before the last final answer.

    That is the reasoning, and built-in tools' calls and results, which are part of it. An open tool loop keeps all
    of them: no final answer has followed yet.
    """
    last_final = _last(messages, lambda message: message.is_final)
    return [
        position for position, message in enumerate(messages) if position > last_final or message.channel != "analysis"
    ]


def _is_reasoned(messages: Sequence[Message], start: int) -> bool:
    """Whether a chain of thought leads to the end of `messages`, in the turn from `start` on or in its tool loop."""
    asked = _last(messages[:start], lambda message: message.role == "user" or message.is_final)
    return any(message.is_reasoning for message in messages[asked + 1 :])


def _last(messages: Sequence[Message], wanted: Callable[[Message], bool]) -> int:
    """Position of the last message that is wanted, -1 if there is none."""
    return max((position for position, message in enumerate(messages) if wanted(message)), default=-1)
