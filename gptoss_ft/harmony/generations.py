"""What the model is asked and what it answers: one training sample for each time it would be sampled.

The model stops at a call or at the end of a final answer, so a conversation holds a generation for each of these.
Its prompt is the one inference would send; its completion is exactly what the model writes.

Of several calls in a row each is a generation of its own, prompted with the calls before it: a reader lays out
calls and results as a serving loop produces them (call, result, call, result), and only where the data has no
results does one call directly follow another.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from gptoss_ft.errors import UserError
from gptoss_ft.harmony.conversation import Conversation, Message
from gptoss_ft.harmony.render import generation_prompt, message_ids, opening_ids
from gptoss_ft.harmony.vocabulary import RETURN


@dataclass(frozen=True)
class Generation:
    """`completion_ids` follow `prompt_ids` directly; `loss_weights` has one weight for each completion token."""

    prompt_ids: list[int]
    completion_ids: list[int]
    loss_weights: list[float]
    index: int


def generations(conversation: Conversation) -> list[Generation]:
    """One sample per assistant turn, a turn being all messages up to and including a call or a final answer.

    A final answer ends in `<|return|>` as a target and in `<|end|>` as history.

    Raises:
        UserError: if a turn ends in neither a call nor a final answer.
    """
    messages = conversation.messages
    opening = opening_ids(conversation)
    encoded = [message_ids(message) for message in messages]
    ask = generation_prompt()
    samples = []
    for index, (start, stop) in enumerate(_turns(messages)):
        kept = _kept_in_history(messages[:start])
        prompt = [*opening, *chain.from_iterable(encoded[position] for position in kept), *ask]
        turn = range(start, stop)
        completion = list(chain.from_iterable(encoded[position] for position in turn))
        weights = [messages[position].weight for position in turn for _ in encoded[position]]
        if messages[stop - 1].is_final:
            completion[-1] = RETURN
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
    """Positions that a prompt keeps: all but the reasoning before the last final answer.

    Reasoning of an open tool loop stays: no final answer has followed it yet.
    """
    last_final = max((position for position, message in enumerate(messages) if message.is_final), default=-1)
    return [position for position, message in enumerate(messages) if position > last_final or not message.is_reasoning]
