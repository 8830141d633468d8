"""See rows as training sees them: counted, rendered to tokens, or shown."""

import json
import sys
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

from gptoss_ft.config.commands import DataCheckCommand, DataClearCommand, DataPreviewCommand, DataRenderCommand
from gptoss_ft.config.schema import RowsConfig
from gptoss_ft.data.check import CheckReport
from gptoss_ft.data.html_preview import preview_page
from gptoss_ft.data.measure import measure
from gptoss_ft.data.rows import Row, map_rows
from gptoss_ft.data.sample import sample_of
from gptoss_ft.data.skipped import SkippedRows
from gptoss_ft.data.spans import tokens_text
from gptoss_ft.data.terminal import show_sample
from gptoss_ft.files import check_writable_parent, whole_file, write_whole
from gptoss_ft.harmony.generations import Generation, generations
from gptoss_ft.recipes.samples import loss_rules, row_settings


def check(cfg: DataCheckCommand) -> CheckReport:
    """Run `gptoss-ft data check`; returns the report, whose text is for people.

    Raises:
        UserError: if a row cannot be used, or more rows than may be skipped.
    """
    with SkippedRows(cfg.skipped_path) as skipped:
        report = CheckReport(cfg.max_length, skipped=skipped)
        for row in map_rows(
            cfg.path,
            partial(measure, rules=loss_rules(cfg)),
            row_settings(cfg),
            skipped=skipped,
            announce=_say,
            needs_answers=False,
            progress=True,
        ):
            report.add(row)
    return report


def render(cfg: DataRenderCommand) -> Path:
    """Run `gptoss-ft data render`; returns the file, a JSON object on each line for each generation.

    Keys: `row` (file:line), `generation` (from 0 within the row), `tokens`, `loss_weights` (one for each token) and
    `text`. Nothing is dropped here, not even what is over `max_length`.
    """
    out = Path(cfg.out)
    check_writable_parent(out.parent)
    with SkippedRows(cfg.skipped_path) as skipped, whole_file(out) as file:
        for row, sample in _generations(cfg, skipped):
            line = {
                "row": row.where,
                "generation": sample.index,
                "tokens": [*sample.prompt_ids, *sample.completion_ids],
                "loss_weights": [*[0.0] * len(sample.prompt_ids), *sample.loss_weights],
                "text": tokens_text([*sample.prompt_ids, *sample.completion_ids]),
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return out


def preview(cfg: DataPreviewCommand) -> None:
    """Run `gptoss-ft data preview`: the first samples in the terminal, or as a web page in `out`."""
    if cfg.out:
        check_writable_parent(Path(cfg.out).parent)
    with SkippedRows(cfg.skipped_path) as skipped:
        rows = islice(_generations(cfg, skipped), cfg.count)
        samples = [sample_of(generation, row.where) for row, generation in rows]
    if not cfg.out:
        for sample in samples:
            show_sample(sample)
        return
    write_whole(cfg.out, preview_page(samples, max_length=cfg.max_length))
    print(cfg.out)


def clear(cfg: DataClearCommand) -> str:
    """Run `gptoss-ft data clear`; returns what was done. Runs that use the samples meanwhile keep them."""
    from gptoss_ft.data.cache import default_folder, remove_unused

    folder = Path(cfg.cache_dir) if cfg.cache_dir else default_folder()
    return f"{folder}: {remove_unused(folder, days=cfg.days) / 1e6:.1f} MB freed"


def _generations(cfg: RowsConfig, skipped: SkippedRows) -> Iterator[tuple[Row[list[Generation]], Generation]]:
    """Every generation with its row."""
    compile_row = partial(generations, rules=loss_rules(cfg))
    settings = row_settings(cfg)
    for row in map_rows(cfg.path, compile_row, settings, skipped=skipped, announce=_say, progress=True):
        for generation in row.result:
            yield row, generation


def _say(text: str) -> None:
    print(text, file=sys.stderr)
