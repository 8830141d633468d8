"""Previews, read back by an HTML parser or from the margins, show the very tokens and labels of the sample."""

from html.parser import HTMLParser

import pytest

from gptoss_ft.data.preview import CHANNEL_COLOURS, LOSS_BACKGROUND, sample_html, sample_text
from gptoss_ft.data.sample import IGNORED_LABEL, Sample
from gptoss_ft.data.schemas.messages import read_messages_row
from gptoss_ft.data.spans import token_text, tokens_text
from gptoss_ft.harmony.generations import generations
from gptoss_ft.harmony.vocabulary import CHANNEL, decode, encode

HOSTILE = "</span><script>alert(1)</script> & &amp; \"'\r\n\tn\u00efce \U0001fae0 <|end|>"
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
ROW = {
    "messages": [
        {"role": "user", "content": f"What is 1 + 2? {HOSTILE}"},
        {"role": "assistant", "thinking": "I add.\n\nThen I say it.", "tool_calls": [CALL]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": f"It is 3. {HOSTILE}"},
    ],
    "tools": [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}],
}


@pytest.fixture(scope="module", params=[0, 1], ids=["call", "answer"])
def sample(request):
    generation = generations(read_messages_row(ROW))[request.param]
    weights = [0.0] * len(generation.prompt_ids) + generation.loss_weights
    return Sample(generation.prompt_ids + generation.completion_ids, weights, "some/rows.jsonl:7", request.param)


class Spans(HTMLParser):
    """Ids, styles and texts of the token spans; any tag but div and span is an error."""

    def __init__(self, html):
        super().__init__()
        self.tokens, self.depth = [], 0
        self.feed(html)
        assert self.depth == 0

    def handle_starttag(self, tag, attrs):
        assert tag in ("div", "span")
        self.depth += 1
        attributes = dict(attrs)
        self.is_token = "title" in attributes
        if self.is_token:
            self.tokens.append([int(attributes["title"]), attributes["style"], ""])

    def handle_endtag(self, tag):
        self.depth -= 1
        self.is_token = False

    def handle_data(self, data):
        if self.is_token:
            self.tokens[-1][2] += data


def plain(text):
    """The text without the marks that make white space visible."""
    return text.replace("↵\n", "\n").replace("␍", "\r").replace("⇥", "\t")


def test_html_shows_every_token_in_order(sample):
    tokens = Spans(sample_html(sample)).tokens
    assert [id_ for id_, _, _ in tokens] == sample.input_ids
    whole = [(id_, plain(text)) for id_, _, text in tokens if "\ufffd" not in decode([id_])]
    assert all(text == decode([id_]) for id_, text in whole)
    assert len(whole) < len(tokens)  # the emoji is cut between tokens


def test_html_highlights_exactly_the_tokens_with_loss(sample):
    highlighted = [LOSS_BACKGROUND in style for _, style, _ in Spans(sample_html(sample)).tokens]
    assert highlighted == [label != IGNORED_LABEL for label in sample.labels]


def test_html_colours_each_message_by_its_channel(sample):
    ids_by_channel = {
        name: [id_ for id_, style, _ in Spans(sample_html(sample)).tokens if style.startswith(f"color:{colour}")]
        for name, colour in CHANNEL_COLOURS.items()
    }
    texts = {name: decode(ids) for name, ids in ids_by_channel.items()}
    assert "I add." in texts["analysis"] and "I add." not in texts["commentary"]
    assert "<|channel|>commentary to=functions.add" in texts["commentary"]
    # Every message's header names one channel, and the text of a user has none.
    assert sum(ids.count(CHANNEL) for ids in ids_by_channel.values()) == sample.input_ids.count(CHANNEL)
    assert not any("What is" in text for text in texts.values())
    assert ("It is 3." in texts["final"]) == (sample.generation == 1)


def test_text_is_the_sample_with_a_margin(sample):
    caption, *lines = sample_text(sample).split("\n")
    num_loss = sum(label != IGNORED_LABEL for label in sample.labels)
    assert caption == (
        f"rows.jsonl:7, generation {sample.generation}: {len(sample.input_ids)} tokens, {num_loss} with loss (+)"
    )

    def text_of(lines):
        return plain("".join(line[4:] for line in lines).replace("↵", "↵\n"))

    assert text_of(lines) == decode(sample.input_ids)
    assert text_of(line for line in lines if line.startswith("+ | ")) == decode(sample.input_ids[-num_loss:])
    assert {line[:4] for line in lines} == {"+ | ", "  | "}


def test_bytes_of_a_cut_character_are_shown_by_token_and_joined_in_text():
    ids = encode("\U0001fae0")
    assert len(ids) > 1
    assert "".join(map(token_text, ids)) == r"\xf0\x9f\xab\xa0"
    assert tokens_text(ids) == "\U0001fae0"


def test_ids_that_stand_for_no_token_are_named():
    assert tokens_text([*encode("a b"), 200019, 201087, 200002]) == (
        "a b<|unassigned_200019|><|unassigned_201087|><|return|>"
    )
