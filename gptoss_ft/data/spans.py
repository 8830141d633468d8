"""Who wrote what in a sample: its messages as ranges of tokens, told from the ids alone.

Any ids are taken that a model can produce: an id that stands for no token is named by number.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise, takewhile

from gptoss_ft.harmony.vocabulary import CHANNEL, MESSAGE, NUM_RANKS, SPECIAL_TOKENS, START, decode, token_bytes

CONTROL_NAMES = {id_: name for name, id_ in SPECIAL_TOKENS.items()}


@dataclass(frozen=True)
class Span:
    """Tokens `start` to `stop` (exclusive) of one message, `<|start|>` to its stop token.

    `author` is as the header has it: system, developer, user, assistant or a tool's name.
    """

    start: int
    stop: int
    author: str
    channel: str | None
    recipient: str | None

    @property
    def kind(self) -> str:
        """The channel of an assistant's message; system, developer or user; tool for any tool."""
        if self.author == "assistant":
            return self.channel or "assistant"
        return self.author if self.author in ("system", "developer", "user") else "tool"


def spans(ids: Sequence[int]) -> Iterator[Span]:
    """The messages of a sample, in order; tokens before the first `<|start|>` are one of no author."""
    starts = [position for position, id_ in enumerate(ids) if id_ == START]
    for start, stop in pairwise(sorted({0, *starts, len(ids)})):
        yield _span(ids[start:stop], start, stop)


def tokens_text(ids: Sequence[int]) -> str:
    """Text of the ids."""
    runs = [(assigned, list(run)) for assigned, run in groupby(ids, key=is_assigned)]
    return "".join(decode(run) if assigned else "".join(map(token_text, run)) for assigned, run in runs)


def token_text(id_: int) -> str:
    r"""One token by itself; one that ends inside a UTF-8 character shows the bytes as `\xe2`."""
    if not is_assigned(id_):
        return f"<|unassigned_{id_}|>"
    return token_bytes(id_).decode(errors="backslashreplace")


def is_assigned(id_: int) -> bool:
    return id_ < NUM_RANKS or id_ in CONTROL_NAMES


def _span(ids: Sequence[int], start: int, stop: int) -> Span:
    header = list(takewhile(lambda id_: id_ != MESSAGE, ids))
    words = tokens_text(list(takewhile(lambda id_: id_ != CHANNEL, header[1:]))).split()
    behind = header[header.index(CHANNEL) + 1 :] if CHANNEL in header else []
    routed = tokens_text(list(takewhile(lambda id_: id_ not in CONTROL_NAMES, behind))).split()
    recipient = next((word[3:] for word in [*words, *routed] if word.startswith("to=")), None)
    author = words[0].partition(":")[0] if words else ""
    return Span(start, stop, author, routed[0] if routed else None, recipient)
