"""A sample in a terminal: coloured by channel where the terminal has colours, `+` in the margin where it has loss."""

from rich.console import Console
from rich.text import Text

from gptoss_ft.data.preview import WHITESPACE, caption
from gptoss_ft.data.sample import Sample
from gptoss_ft.data.spans import spans, tokens_text

STYLES = {
    "analysis": "magenta",
    "commentary": "blue",
    "final": "green",
    "system": "dim",
    "developer": "yellow",
    "tool": "cyan",
}


def show_sample(sample: Sample, console: Console | None = None) -> None:
    """Print a sample, a line for each message and line of text."""
    console = console or Console(highlight=False, soft_wrap=True)
    console.print(Text(caption(sample, " (+)"), style="bold"))
    for span in spans(sample.input_ids):
        style = STYLES.get(span.kind, "")
        start = span.start
        for stop in range(start + 1, span.stop + 1):
            has_loss = sample.loss_weights[start] > 0
            if stop < span.stop and (sample.loss_weights[stop] > 0) == has_loss:
                continue
            for line in tokens_text(sample.input_ids[start:stop]).translate(WHITESPACE).split("\n"):
                text = Text("+ | " if has_loss else "  | ", style="bold yellow" if has_loss else "dim")
                console.print(text.append(line, style=style))
            start = stop
    console.print()
