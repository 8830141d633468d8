"""A report on rows before they are trained on: what they hold, what is dropped, what looks wrong."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from gptoss_ft.data.measure import PROBLEMS, RowMeasure
from gptoss_ft.data.rows import Row
from gptoss_ft.data.skipped import SkippedRows

SHOWN_PLACES = 3
SHOWN_NAMES = 20
# An answer that this share of the rows give, and at least this many, is worth a look.
COMMON_SHARE, COMMON_ROWS = 0.05, 5
BAR = 40


@dataclass
class CheckReport:
    """Counts over all rows; memory grows by two numbers a row, which find repeated rows and answers.

    Attributes:
        places: by problem, where it was first seen.
    """

    max_length: int
    rows: int = 0
    by_format: Counter[str] = field(default_factory=Counter)
    by_effort: Counter[str] = field(default_factory=Counter)
    by_channel: Counter[str] = field(default_factory=Counter)
    by_tool: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    loss_tokens: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    generations: int = 0
    too_long: int = 0
    longest: int = 0
    without_loss: int = 0
    problems: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)
    skipped: SkippedRows = field(default_factory=SkippedRows)
    _seen: set[int] = field(default_factory=set)
    _answers: Counter[int] = field(default_factory=Counter)
    _answer_places: dict[int, str] = field(default_factory=dict)

    def add(self, row: Row[RowMeasure]) -> None:
        measured = row.result
        self.rows += 1
        self.by_format[row.format] += 1
        self.by_effort[measured.effort] += 1
        self.by_channel.update(measured.messages)
        self.by_tool.update(measured.called)
        self.tokens.update(measured.tokens)
        self.loss_tokens.update(measured.loss_tokens)
        for sample in measured.generations:
            self.generations += 1
            self.lengths[_length_class(sample.tokens)] += 1
            self.longest = max(self.longest, sample.tokens)
            self.too_long += sample.tokens > self.max_length and sample.loss_tokens > 0
            self.without_loss += sample.loss_tokens == 0
        problems = list(measured.problems)
        if any(sample.tokens > self.max_length for sample in measured.generations):
            problems.append("too_long")
        if measured.digest in self._seen:
            problems.append("duplicate")
        self._seen.add(measured.digest)
        for name in problems:
            self._note(name, row.where)
        if measured.answer is not None:
            self._answers[measured.answer] += 1
            self._answer_places.setdefault(measured.answer, row.where)

    def suspected(self) -> Iterator[tuple[str, int, list[str]]]:
        """Problems with their number of rows and first places, by gravity times rows."""
        meanings = PROBLEMS | {
            "too_long": f"a sample is over max_length={self.max_length} tokens and is dropped, never cut",
            "duplicate": "the row repeats an earlier one",
        }
        order = ["no_loss", "too_long", *[name for name in PROBLEMS if name != "no_loss"], "duplicate"]
        weights = {name: 1 + len(order) - position for position, name in enumerate(order)}
        found = [(weights[name], meanings[name], count, self.places[name]) for name, count in self.problems.items()]
        for answer, count in self._answers.most_common(1):
            if count >= max(COMMON_ROWS, COMMON_SHARE * self.rows):
                found.append((1, "the same answer is given again and again", count, [self._answer_places[answer]]))
        for _, meaning, count, places in sorted(found, key=lambda problem: -problem[0] * problem[2]):
            yield meaning, count, places

    def to_dict(self) -> dict[str, object]:
        """The report for programs."""
        return {
            "rows": self.rows,
            "generations": self.generations,
            "by_format": dict(self.by_format),
            "by_effort": dict(self.by_effort),
            "messages_by_channel": dict(self.by_channel),
            "calls_by_tool": dict(self.by_tool),
            "tokens": dict(self.tokens),
            "loss_tokens": dict(self.loss_tokens),
            "generations_by_length": {f"<= {upper}": self.lengths[upper] for upper in sorted(self.lengths)},
            "longest": self.longest,
            "dropped_too_long": self.too_long,
            "dropped_without_loss": self.without_loss,
            "skipped": self.skipped.count,
            "problems": [
                {"problem": meaning, "rows": count, "first": places} for meaning, count, places in self.suspected()
            ],
        }

    def __str__(self) -> str:
        lines = [f"{self.rows} rows, {self.generations} generations, {sum(self.tokens.values())} tokens"]
        lines += ["", *_table("rows by format", self.by_format)]
        lines += _table("rows by reasoning effort", self.by_effort)
        lines += _table("messages by channel or role", self.by_channel)
        lines += _table("calls by tool", self.by_tool)
        lines += ["tokens by channel or role (with loss)"]
        width = max(map(len, self.tokens), default=0)
        lines += [f"  {name:<{width}} {n:>12,} ({self.loss_tokens[name]:,})" for name, n in self.tokens.most_common()]
        lines += ["generations by length in tokens", *self._histogram()]
        lines += [
            "dropped",
            f"  {self.too_long:,} generations over max_length={self.max_length} (the longest has {self.longest:,})",
            f"  {self.without_loss:,} generations without loss on any token",
            "  nothing is truncated: a cut sample would not teach where to stop",
        ]
        if self.skipped.count:
            lines.append(str(self.skipped))
        problems = list(self.suspected())
        lines.append("suspected problems, by gravity and number" if problems else "no problem suspected")
        for meaning, count, places in problems:
            lines.append(f"  {count:,} row{'s' * (count != 1)}: {meaning}")
            lines.append(f"      first in {', '.join(places)}")
        return "\n".join(lines)

    def _note(self, name: str, where: str) -> None:
        self.problems[name] += 1
        places = self.places.setdefault(name, [])
        if len(places) < SHOWN_PLACES:
            places.append(where)

    def _histogram(self) -> Iterator[str]:
        most = max(self.lengths.values(), default=1)
        for upper in sorted(self.lengths):
            count = self.lengths[upper]
            yield f"  {upper // 2:>7,} to {upper:>7,} {count:>9,} {'█' * max(1, round(BAR * count / most))}"


def _length_class(num_tokens: int) -> int:
    """The power of two that bounds a length from above."""
    return 1 << (num_tokens - 1).bit_length()


def _table(title: str, counts: Counter[str]) -> list[str]:
    if not counts:
        return []
    shown = counts.most_common(SHOWN_NAMES)
    width = max(len(name) for name, _ in shown)
    more = [f"  ... and {len(counts) - len(shown)} more"] if len(counts) > len(shown) else []
    return [title, *[f"  {name:<{width}} {count:>9,}" for name, count in shown], *more]
