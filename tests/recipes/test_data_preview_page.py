"""`gptoss-ft data preview out=...`: the page in a real browser, by mouse and by keyboard alone."""

import json

import pytest

from gptoss_ft.cli import main
from gptoss_ft.data.dataset import compile_samples
from gptoss_ft.data.spans import token_text, tokens_text
from gptoss_ft.harmony.vocabulary import encode

from .browser import Browser, find_browser

pytestmark = pytest.mark.skipif(find_browser() is None, reason="no Chromium to open the page with")

HOSTILE = "</script><script>document.title='owned'</script> <!-- <img src=x onerror=\"document.title='owned'\"> é🫠"
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
ROWS = [
    {
        "messages": [
            {"role": "system", "content": "Add."},
            {"role": "user", "content": f"1 + 2? {HOSTILE}\n\ttabbed"},
            {"role": "assistant", "thinking": "I add.", "tool_calls": [CALL]},
            {"role": "tool", "content": "3"},
            {"role": "assistant", "content": "Three it is."},
        ]
    },
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "needle", "weight": 0}]},
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "word " * 300}]},
]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    # Of all texts in the page only a path can hold the end of a script element in one piece.
    rows, out = folder / "<" / "script>" / "rows.jsonl", folder / "preview.html"
    rows.parent.mkdir(parents=True)
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    assert main(["data", "preview", f"path={rows}", f"out={out}", "max_length=250"]) == 0
    return out


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def opened(browser, page):
    browser.open(page)
    return browser


def tokens(browser):
    """The tokens on show: position, text and classes."""
    script = "[...document.querySelectorAll('.tokens span')].map(e => [+e.dataset.at, e.textContent, e.className])"
    return browser.run(script)


def listed(browser):
    return browser.run("[...document.querySelectorAll('#list li')].map(e => e.innerText.replace(/\\s+/g, ' '))")


def status(browser):
    return browser.run("document.getElementById('token').textContent")


def test_every_token_is_shown_with_its_loss(opened, page):
    (sample, *_) = compile_samples([page.parent / "<" / "script>" / "rows.jsonl"], max_length=4096).samples
    shown = tokens(opened)
    assert [position for position, _, _ in shown] == list(range(len(sample.input_ids)))
    visible = str.maketrans({"\n": "↵\n", "\t": "⇥"})
    # A character of several tokens is shown by the first of them.
    parts = [(shown[place], token_text(id_)) for place, id_ in enumerate(sample.input_ids)]
    whole = [(text, expected.translate(visible)) for (_, text, _), expected in parts if "\\x" not in expected]
    assert all(text == expected for text, expected in whole) and len(whole) < len(parts)
    seen = "".join(text for _, text, classes in shown if "rest" not in classes)
    assert seen == tokens_text(sample.input_ids).translate(visible) and "é🫠" in seen
    assert ["loss" in classes for _, _, classes in shown] == [weight > 0 for weight in sample.loss_weights]
    headings = opened.run("[...document.querySelectorAll('h2 span:first-child')].map(e => e.textContent)")
    assert headings == [
        "system",
        "developer",
        "user",
        "assistant · analysis",
        "assistant · commentary · to functions.add",
    ]


def test_text_of_rows_is_only_text_and_the_page_fetches_nothing(opened):
    assert opened.run("document.title") == "Samples, token by token"
    assert opened.run("document.querySelectorAll('script').length") == 2
    assert all(url.startswith(("file:", "about:")) for url in opened.requests)
    assert opened.messages == []


def test_the_list_says_what_was_asked(opened):
    asked = opened.run("[...document.querySelectorAll('#list .asked')].map(e => e.textContent)")
    assert asked[0].startswith("1 + 2? </script>") and asked[2:] == ["q", "q"]


def test_what_is_learned_is_one_key_away(opened):
    opened.press("l")
    first = opened.run("at")
    weights = json.loads(opened.run("JSON.stringify(samples[0].weights)"))
    assert first == next(place for place, weight in enumerate(weights) if weight)
    assert opened.run("document.activeElement.id") == "sample"
    box = opened.run("document.querySelector('.at').getBoundingClientRect().toJSON()")
    assert 0 < box["y"] < 700
    opened.press("n", "n", "l")
    assert opened.run("[current, at]") == [2, -1]  # nothing is learned there


def test_a_weight_below_one_is_paler(browser, tmp_path):
    rows, out = tmp_path / "rows.jsonl", tmp_path / "preview.html"
    turn = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows.write_text("".join(json.dumps({"messages": [turn[0], {**turn[1], "weight": w}]}) + "\n" for w in (0.5, 1)))
    assert main(["data", "preview", f"path={rows}", f"out={out}"]) == 0
    browser.open(out)
    assert browser.run("document.querySelectorAll('.less').length === document.querySelectorAll('.loss').length")
    paler = browser.run("getComputedStyle(document.querySelector('.tokens .loss')).backgroundColor")
    browser.press("n")
    assert browser.run("document.querySelectorAll('.less').length") == 0
    assert browser.run("getComputedStyle(document.querySelector('.tokens .loss')).backgroundColor") != paler


def test_ten_thousand_samples_are_no_burden(browser, tmp_path):
    rows, out = tmp_path / "rows.jsonl", tmp_path / "preview.html"
    with rows.open("w") as file:
        for number in range(10_000):
            messages = [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": "a"}]
            file.write(json.dumps({"messages": messages}) + "\n")
    assert main(["data", "preview", f"path={rows}", f"out={out}", "count=10000"]) == 0
    browser.open(out)
    assert browser.run("document.getElementById('count').textContent") == "10000 of 10000 samples"
    assert len(listed(browser)) == 201 and listed(browser)[-1] == "9800 after these"
    # Ten times what it took while other programs kept the machine busy.
    assert (
        browser.run("(() => { const start = performance.now(); filter(); return performance.now() - start })()") < 2000
    )
    browser.run("list.focus()")
    browser.press("End")
    assert browser.run("current") == 9999
    assert (listed(browser)[0], len(listed(browser))) == ("9800 before these", 201)
    browser.press("/", *"question 77")
    assert browser.run("new Promise(done => setTimeout(() => done(shown.length), 600))", wait=True) == 111
    browser.run("[...document.querySelectorAll('#list li')].at(-1).click()")
    assert browser.run("current") == 110


def test_search_and_filters(opened):
    assert len(listed(opened)) == 4
    assert opened.run("document.getElementById('count').textContent") == "4 of 4 samples"
    opened.press("/", *"NEEDLE")
    assert [entry.partition(" ")[0] for entry in listed(opened)] == ["rows.jsonl:2"]
    assert tokens_text(encode("needle")) == "".join(text for _, text, classes in tokens(opened) if "hit" in classes)
    opened.run("search.value = 'nowhere'; search.dispatchEvent(new Event('input'))")
    assert listed(opened) == [] and "No sample fits." in opened.run("view.textContent")
    opened.run("search.value = ''; search.dispatchEvent(new Event('input'))")

    def filtered(control, value):
        opened.run(f"{control}.value = '{value}'; {control}.dispatchEvent(new Event('change'))")
        found = [entry.partition(" ")[0] for entry in listed(opened)]
        opened.run(f"{control}.value = ''; {control}.dispatchEvent(new Event('change'))")
        return found

    assert filtered("kind", "tool") == ["rows.jsonl:1"]
    assert filtered("kind", "analysis") == ["rows.jsonl:1", "rows.jsonl:1"]
    assert filtered("loss", "no") == ["rows.jsonl:2"]
    assert filtered("loss", "long") == ["rows.jsonl:3"]
    assert "too long, dropped" in listed(opened)[3]


def test_a_token_under_the_mouse_tells_its_id(opened):
    box = opened.run("document.querySelector('[data-at=\"3\"]').getBoundingClientRect().toJSON()")
    opened.point(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    (sample,) = json.loads(opened.run("JSON.stringify(samples.slice(0, 1))"))
    assert status(opened) == f"token 3: id {sample['ids'][3]}, {json.dumps(token_text(sample['ids'][3]))}, no loss"


def test_the_keyboard_reaches_everything(opened):
    focused = []
    for _ in range(5):
        opened.press("Tab")
        focused.append(opened.run("document.activeElement.id"))
    assert focused == ["search", "kind", "loss", "list", "sample"]
    opened.press("ArrowRight", "ArrowRight", "ArrowLeft")
    assert status(opened).startswith('token 0: id 200006, "<|start|>", no loss')
    opened.press(*["ArrowDown"] * 3)
    opened.press("ArrowRight")
    assert status(opened).startswith("token ") and opened.run("at") == opened.run("shown[0].spans[3].start + 1")
    opened.press(*["ArrowRight"] * 3)
    assert status(opened).endswith("loss weight 1")
    opened.press("n", "n", "p")
    assert opened.run("current") == 1
    opened.run("list.focus()")
    opened.press("End")
    assert opened.run("list.getAttribute('aria-activedescendant')") == "sample-3"
    assert opened.run("document.querySelector('[aria-selected=true]').id") == "sample-3"
    opened.press("Enter")
    assert opened.run("document.activeElement.id") == "sample"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_can_be_read(opened, scheme):
    """Contrast of at least 4.5, WCAG's level AA, on the panel and on the mark of loss."""
    opened.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    names = ["text", "soft", "panel", "page", "loss", "hit", "system", "developer", "user", "analysis", "commentary"]
    script = "(n) => getComputedStyle(document.documentElement).getPropertyValue('--' + n).trim()"
    colours = dict(zip(names, opened.run(f"{json.dumps(names)}.map({script})"), strict=True))
    colours |= {n: opened.run(f"({script})('{n}')") for n in ("final", "tool")}

    def luminance(colour):
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    def contrast(one, other):
        dark, light = sorted(map(luminance, (colours[one], colours[other])))
        return (light + 0.05) / (dark + 0.05)

    pairs = [(n, "panel") for n in ("text", "soft", "system", "developer", "user", "tool", "analysis", "commentary")]
    pairs += [(n, mark) for n in ("analysis", "commentary", "final") for mark in ("loss", "panel")]
    pairs += [("soft", "page"), ("text", "page")]
    assert {pair: round(contrast(*pair), 2) for pair in pairs if contrast(*pair) < 4.5} == {}
    opened.call("Emulation.setEmulatedMedia", features=[])


def test_the_page_is_not_blank(opened):
    assert len(opened.screenshot()) > 20_000
