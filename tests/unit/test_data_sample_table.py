"""The table of samples: what is written is read, in any order, without holding it in memory."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_ft.data import sample_table
from gptoss_ft.data.sample import Sample
from gptoss_ft.data.sample_table import SampleTable, SampleWriter

ids = st.integers(0, 201087)
weights = st.floats(0, 4, width=32)
rows = st.builds("{}:{}".format, st.sampled_from(["a.jsonl", "b:1/ä.jsonl"]), st.integers(1, 3))


@st.composite
def samples(draw):
    tokens = draw(st.lists(ids, min_size=1, max_size=30))
    weight = draw(st.lists(weights, min_size=len(tokens), max_size=len(tokens)))
    return Sample(tokens, weight, draw(rows), draw(st.integers(0, 3)))


@settings(max_examples=40, deadline=None)
@given(st.lists(samples(), max_size=12), st.integers(1, 40), st.data())
def test_what_is_written_is_read(written, batch_tokens, data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_table, "BATCH_TOKENS", batch_tokens)
        table = SampleTable.of(written)
    assert list(table) == written
    order = data.draw(st.lists(st.integers(0, len(written) - 1), max_size=20)) if written else []
    taken = table.take(order)
    assert list(taken) == [written[place] for place in order]
    assert taken.lengths.tolist() == [len(sample.input_ids) for sample in taken]
    assert [taken.files[number] for number in taken.file_numbers] == [s.row.rpartition(":")[0] for s in taken]
    assert list(taken[1:]) == list(taken)[1:]
    for one, other in zip(range(len(written)), range(1, len(written)), strict=False):
        same_row = written[one].row == written[other].row
        assert table.row_numbers[other] - table.row_numbers[one] == (0 if same_row else 1)


def test_a_file_that_was_not_finished_cannot_be_opened(tmp_path):
    with pytest.raises(KeyboardInterrupt), SampleWriter(tmp_path / "samples.arrow"):
        raise KeyboardInterrupt
    with pytest.raises((OSError, ValueError)):
        SampleTable(tmp_path / "samples.arrow")


MEASURE = """
import resource, sys
from pathlib import Path
import numpy as np
from gptoss_ft.data.sample_table import SampleTable, SampleWriter
with SampleWriter(Path(sys.argv[1])) as writer:
    ids = np.arange(4096, dtype=np.int32)
    for line in range(int(sys.argv[2])):
        writer.add(ids, ids.astype(np.float32), row=line, file="rows.jsonl", line=line, generation=0)
table = SampleTable(Path(sys.argv[1]))
assert all(table.arrays(place)[0][-1] == 4095 for place in range(len(table)))
lines = open("/proc/self/status").read().splitlines()
print(next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_samples(tmp_path):
    """20 and 320 MB of samples: what cannot be given back to the disk stays the same to 8 MB."""

    def anonymous_kib(num_samples):
        command = [sys.executable, "-c", MEASURE, str(tmp_path / "samples.arrow"), str(num_samples)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert abs(anonymous_kib(10_000) - anonymous_kib(640)) < 8 * 1024
