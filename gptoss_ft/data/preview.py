r"""A sample as people read it: every token, the channel it is on, and whether the loss falls on it.

Control tokens go by their names. A token that ends inside a UTF-8 character shows the bytes as `\xe2`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

from gptoss_ft.data.sample import Sample
from gptoss_ft.data.spans import CONTROL_NAMES, spans, token_text, tokens_text
from gptoss_ft.harmony.vocabulary import START

CHANNEL_COLOURS = {"analysis": "#8250df", "commentary": "#0550ae", "final": "#116329"}
NO_CHANNEL_COLOUR = "#57606a"
LOSS_BACKGROUND = "#fff3bf"
WHITESPACE = str.maketrans({"\n": "↵\n", "\r": "␍", "\t": "⇥"})


def sample_html(sample: Sample) -> str:
    """An HTML fragment: a span per token, its id as tooltip, coloured by channel, highlighted where it has loss."""
    # Styles are inline, because notebooks drop style sheets from outputs that they do not trust.
    channels = "".join(f' · <span style="color:{colour}">{name}</span>' for name, colour in CHANNEL_COLOURS.items())
    legend = f'{escape(caption(sample))} (<span style="background:{LOSS_BACKGROUND}">highlighted</span>){channels}'
    spans = "".join(_span(token) for token in _tokens(sample))
    return (
        '<div style="background:#fff;color:#1f2328;padding:.6em;border:1px solid #d0d7de;font-size:12px">'
        f"<div>{legend}</div>"
        f'<div style="font-family:monospace;white-space:pre-wrap;overflow-wrap:anywhere;margin-top:.6em">{spans}</div>'
        "</div>"
    )


def sample_text(sample: Sample) -> str:
    """The sample for a terminal: a line for each message and line of text, `+` in the margin where it has loss."""
    lines = [caption(sample, " (+)")]
    block: list[int] = []
    pairs = list(zip(sample.input_ids, _has_loss(sample), strict=True))
    for position, (id_, has_loss) in enumerate(pairs):
        block.append(id_)
        following = pairs[position + 1] if position + 1 < len(pairs) else None
        if following is None or following[0] == START or following[1] != has_loss:
            margin = "+ | " if has_loss else "  | "
            lines += [margin + line for line in tokens_text(block).translate(WHITESPACE).split("\n")]
            block = []
    return "\n".join(lines)


@dataclass(frozen=True)
class _Token:
    id: int
    channel: str | None
    has_loss: bool


def _tokens(sample: Sample) -> Iterator[_Token]:
    """Every token with the channel of its message."""
    has_loss = _has_loss(sample)
    for span in spans(sample.input_ids):
        for position in range(span.start, span.stop):
            yield _Token(sample.input_ids[position], span.channel, has_loss[position])


def _span(token: _Token) -> str:
    style = f"color:{CHANNEL_COLOURS.get(token.channel or '', NO_CHANNEL_COLOUR)}"
    if token.has_loss:
        style += f";background:{LOSS_BACKGROUND}"
    if token.id in CONTROL_NAMES:
        style += ";font-weight:bold"
    # The line shows where one token ends and the next begins, spaces included.
    style += ";border-left:1px solid #d8dee4"
    text = escape(token_text(token.id).translate(WHITESPACE))
    return f'<span title="{token.id}" style="{style}">{text}</span>'


def caption(sample: Sample, loss_mark: str = "") -> str:
    """Where a sample is from and how long it is; `loss_mark` tells how loss is marked below."""
    where = f"{Path(sample.row).name}, generation {sample.generation}"
    return f"{where}: {len(sample.input_ids)} tokens, {sample.num_loss_tokens} with loss{loss_mark}"


def _has_loss(sample: Sample) -> list[bool]:
    return [weight > 0 for weight in sample.loss_weights]
