"""Samples as one web page that needs nothing else: search, filter, and every token's id and weight."""

import json
from collections.abc import Sequence
from importlib.resources import files

from gptoss_ft.data.sample import Sample
from gptoss_ft.data.spans import CONTROL_NAMES, is_assigned, spans, token_text
from gptoss_ft.harmony.vocabulary import token_bytes

PLACE = "/*DATA*/"


def preview_page(samples: Sequence[Sample], *, max_length: int) -> str:
    """The page; samples over `max_length` tokens are marked as dropped."""
    ids = sorted({id_ for sample in samples for id_ in sample.input_ids})
    data = {
        "max_length": max_length,
        "vocabulary": {id_: _entry(id_) for id_ in ids},
        "samples": [
            {
                "row": sample.row,
                "generation": sample.generation,
                "ids": sample.input_ids,
                "weights": sample.loss_weights,
                "spans": [
                    {
                        "start": span.start,
                        "stop": span.stop,
                        "author": span.author,
                        "channel": span.channel,
                        "recipient": span.recipient,
                        "kind": span.kind,
                    }
                    for span in spans(sample.input_ids)
                ],
            }
            for sample in samples
        ],
    }
    # Inside a script element only `<` can end it, and only there does it need an escape.
    content = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    template = (files("gptoss_ft") / "assets" / "preview.html").read_text(encoding="utf-8")
    return template.replace(PLACE, content)


def _entry(id_: int) -> list[str | int]:
    """A token's text, 1 for a control token, and, of a token that is not whole characters, its bytes in hexadecimal."""
    entry: list[str | int] = [token_text(id_), int(id_ in CONTROL_NAMES)]
    if is_assigned(id_) and id_ not in CONTROL_NAMES:
        content = token_bytes(id_)
        try:
            content.decode()
        except UnicodeDecodeError:
            entry.append(content.hex())
    return entry
