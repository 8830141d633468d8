"""The readers under a fuzzer that is led by coverage; `pip install atheris` and `pytest -m slow` run it."""

import json
import subprocess
import sys

import pytest

SECONDS = 60
HARNESS = """
import sys
import atheris
with atheris.instrument_imports(include=["gptoss_ft.data"]):
    import io
    from gptoss_ft.data.detect import detect
    from gptoss_ft.data.json_file import json_objects
    from gptoss_ft.data.measure import measure
    from gptoss_ft.data.schemas.registry import READERS
    from gptoss_ft.data.source import parse_row
    from gptoss_ft.data.tables import csv_rows
from gptoss_ft.errors import UserError
from gptoss_ft.harmony.weights import LossRules

def one(data):
    kind, content = data[:1], data[1:]
    rows = [(1, content)]
    if kind < b"U":
        rows = json_objects(io.BytesIO(content), 2**20)
    elif kind < b"a":
        rows = csv_rows(io.BytesIO(content), 2**20)
    for line, row in rows:
        try:
            row = parse_row(row)
            measure(READERS[detect([(line, row)]).format].read(row), LossRules())
        except (UserError, RecursionError):
            continue

atheris.Setup(sys.argv, one)
atheris.Fuzz()
"""


@pytest.mark.slow
def test_no_input_breaks_the_readers(tmp_path):
    pytest.importorskip("atheris")

    from .test_data_fuzz import SEEDS

    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number, row in enumerate(SEEDS):
        for kind in "A[z":
            (corpus / f"{kind}{number}").write_bytes(kind.encode() + json.dumps(row).encode())
    (corpus / "csv").write_bytes(b"[prompt,completion\n1,2\n")
    command = [sys.executable, "-c", HARNESS, f"-max_total_time={SECONDS}", "-timeout=10", "-rss_limit_mb=2048"]
    result = subprocess.run([*command, str(corpus)], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "DONE" in result.stderr
