"""Samples in a file that is mapped into memory: training holds some twenty bytes of each, however long they are.

The file is Arrow's, with a record batch for about a million tokens. The last batch has no rows, but what is known only
when everything has been written: the names of the files of rows, and the writer's own facts.
"""

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from gptoss_ft.data.sample import Sample
from gptoss_ft.files import naming_a_bad_place, naming_a_full_disk

SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "loss_weights": pa.list_(pa.float32()),
        "row": pa.int32(),
        "file": pa.int32(),
        "line": pa.int64(),
        "generation": pa.int32(),
    }
)
BATCH_TOKENS = 2**20
FILES, FACTS = b"files", b"facts"


class SampleWriter:
    """Writes a file of samples; it can be read when the block has ended without an error.

    Attributes:
        facts: anything in JSON that goes with the samples; set it before the block ends.
    """

    def __init__(self, path: Path):
        self.path = path
        self.facts: Mapping[str, Any] = {}
        self._files: dict[str, int] = {}
        self._ids: list[NDArray[np.int32]] = []
        self._weights: list[NDArray[np.float32]] = []
        self._places: list[tuple[int, int, int, int]] = []
        self._num_tokens = 0

    def __enter__(self) -> "SampleWriter":
        with naming_a_bad_place(self.path):
            self._sink = pa.OSFile(str(self.path), "wb")
        self._writer = pa.ipc.new_file(self._sink, SCHEMA)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with naming_a_full_disk(self.path):
            if kind is None:
                self._flush()
                known = {FILES: json.dumps([*self._files]), FACTS: json.dumps(self.facts)}
                nothing = pa.RecordBatch.from_pydict({name: [] for name in SCHEMA.names}, schema=SCHEMA)
                self._writer.write_batch(nothing, custom_metadata=known)
                self._writer.close()
            self._sink.close()

    def add(
        self, ids: NDArray[np.int32], weights: NDArray[np.float32], *, row: int, file: str, line: int, generation: int
    ) -> None:
        """Append a sample: token ids and the weight of each one's loss, and where it is from.

        `row` is the same for the samples of a row of data and rises with each: several may be on one line.
        """
        self._ids.append(ids)
        self._weights.append(weights)
        self._places.append((row, self._files.setdefault(file, len(self._files)), line, generation))
        self._num_tokens += len(ids)
        if self._num_tokens >= BATCH_TOKENS:
            with naming_a_full_disk(self.path):
                self._flush()

    def _flush(self) -> None:
        if not self._ids:
            return
        offsets = np.cumsum([0, *map(len, self._ids)], dtype=np.int32)
        lists = [pa.ListArray.from_arrays(offsets, np.concatenate(parts)) for parts in (self._ids, self._weights)]
        columns = zip(zip(*self._places, strict=True), [*SCHEMA][len(lists) :], strict=True)
        places = [pa.array(values, field.type) for values, field in columns]
        self._writer.write_batch(pa.RecordBatch.from_arrays([*lists, *places], schema=SCHEMA))
        self._ids, self._weights, self._places, self._num_tokens = [], [], [], 0


class SampleTable(Sequence[Sample]):
    """Samples of a file, or some of them in any order; the file may be removed while the table is in use.

    Attributes:
        files: the names of the files that rows are from.
        facts: what the writer said of all its samples.
    """

    def __init__(self, path: Path):
        """Open a file that `SampleWriter` wrote.

        Raises:
            pyarrow.ArrowInvalid, OSError: if it is not whole, or not there.
        """
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        count = reader.num_record_batches
        self._batches = [reader.get_batch(number) for number in range(count - 1)]
        known = reader.get_batch_with_custom_metadata(count - 1).custom_metadata
        self.files: list[str] = json.loads(known[FILES])
        self.facts: dict[str, Any] = json.loads(known[FACTS])
        sizes = [batch.num_rows for batch in self._batches]
        self._starts = np.cumsum([0, *sizes])
        self._lengths = _joined(
            [np.diff(batch.column("input_ids").offsets.to_numpy()) for batch in self._batches], np.int32
        )
        self._files = _joined([batch.column("file").to_numpy() for batch in self._batches], np.int32)
        self._rows = _joined([batch.column("row").to_numpy() for batch in self._batches], np.int32)
        self._chosen = np.arange(self._starts[-1])

    @classmethod
    def of(cls, samples: Iterable[Sample]) -> "SampleTable":
        """A table of samples that are in memory, in a temporary file; those of a row are one after the other."""
        with tempfile.TemporaryDirectory() as folder:
            with SampleWriter(Path(folder, "samples.arrow")) as writer:
                row, previous = 0, ""
                for sample in samples:
                    row, previous = row + (sample.row != previous), sample.row
                    file, _, line = sample.row.rpartition(":")
                    ids = np.array(sample.input_ids, np.int32)
                    weights = np.array(sample.loss_weights, np.float32)
                    writer.add(ids, weights, row=row, file=file, line=int(line), generation=sample.generation)
            return cls(writer.path)

    def take(self, places: Sequence[int] | NDArray[np.integer] | NDArray[np.bool_]) -> "SampleTable":
        """The samples at these places of the table, in this order; or those where a mask is true."""
        taken = object.__new__(SampleTable)
        # NumPy takes an empty list for one of floats.
        chosen = self._chosen[np.asarray(places)] if len(places) else self._chosen[:0]
        taken.__dict__ = {**self.__dict__, "_chosen": chosen}
        return taken

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each sample."""
        return self._lengths[self._chosen]

    @property
    def row_numbers(self) -> NDArray[np.int32]:
        """A number for each sample that is the same for the samples of a row, and rises in the order of the file."""
        return self._rows[self._chosen]

    @property
    def file_numbers(self) -> NDArray[np.int32]:
        """Which of `files` each sample is from."""
        return self._files[self._chosen]

    def arrays(self, place: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Token ids of a sample and the weight of each one's loss, not copied from the file and so read-only."""
        batch, row = self._find(place)
        ids, weights = batch.column("input_ids")[row], batch.column("loss_weights")[row]
        return ids.values.to_numpy(), weights.values.to_numpy()

    def __len__(self) -> int:
        return len(self._chosen)

    @overload
    def __getitem__(self, place: int) -> Sample: ...
    @overload
    def __getitem__(self, place: slice) -> "SampleTable": ...
    def __getitem__(self, place: int | slice) -> "Sample | SampleTable":
        if isinstance(place, slice):
            return self.take(np.arange(len(self))[place])
        batch, row = self._find(place)
        ids, weights = self.arrays(place)
        where = f"{self.files[batch.column('file')[row].as_py()]}:{batch.column('line')[row]}"
        return Sample(ids.tolist(), weights.tolist(), where, batch.column("generation")[row].as_py())

    def _find(self, place: int) -> tuple[pa.RecordBatch, int]:
        """The batch that holds a sample, and the sample's row in it."""
        at = self._chosen[place]
        number = int(np.searchsorted(self._starts, at, side="right")) - 1
        return self._batches[number], int(at - self._starts[number])


def _joined(parts: list[NDArray[Any]], dtype: type[np.generic]) -> NDArray[Any]:
    return np.concatenate([np.empty(0, dtype), *parts]).astype(dtype, copy=False)
