"""Compiled samples kept between runs, under a name that changes with the rows, the settings and our own code."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

import pyarrow as pa

from gptoss_ft.data.dataset import CompiledSamples, Sample
from gptoss_ft.data.files import expand, kind_of
from gptoss_ft.files import naming_a_bad_place, naming_a_full_disk, partial_of

SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "loss_weights": pa.list_(pa.float64()),
        "row": pa.string(),
        "generation": pa.int32(),
    }
)
CODE = ("data", "harmony")
BATCH_ROWS = 1024
COUNTS = b"counts"


def cached(
    folder: str | Path, paths: Sequence[str | Path], settings: object, compile: Callable[[], CompiledSamples]
) -> CompiledSamples:
    """What `compile` gives for these rows and settings: read from `folder` if it is there, else kept there.

    Hub data sets can change unseen, so that rows of those are compiled every time.

    Args:
        settings: all that the result depends on besides the files' content, with a `repr` that says so.

    Raises:
        UserError: as `compile` does, and if the folder cannot be written.
    """
    found = expand(paths)
    if any(kind_of(file) == "hub" for file in found):
        return compile()
    file = Path(folder) / f"{_key(found, settings)}.arrow"
    if file.exists():
        return _read(file)
    compiled = compile()
    _write(file, compiled)
    return compiled


def _key(found: Sequence[str], settings: object) -> str:
    digest = hashlib.blake2b(repr(settings).encode(), digest_size=16)
    for package in CODE:
        for source in sorted(_sources(files("gptoss_ft") / package), key=lambda source: source.name):
            digest.update(source.read_bytes())
    for path in found:
        digest.update(f"\n{path}\n".encode())
        for file in _files(path):
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "blake2b").digest())
    return digest.hexdigest()


def _sources(folder: Traversable) -> Iterable[Traversable]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _sources(entry)
        elif entry.name.endswith(".py"):
            yield entry


def _files(path: str) -> list[Path]:
    """A file, or the files of a `datasets` folder."""
    return sorted(file for file in Path(path).rglob("*") if file.is_file()) if os.path.isdir(path) else [Path(path)]


def _write(file: Path, compiled: CompiledSamples) -> None:
    counts = asdict(replace(compiled, samples=[]))
    schema = SCHEMA.with_metadata({COUNTS: json.dumps(counts)})
    partial = partial_of(file)
    try:
        with naming_a_bad_place(file), naming_a_full_disk(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
                for start in range(0, len(compiled.samples), BATCH_ROWS):
                    batch = compiled.samples[start : start + BATCH_ROWS]
                    columns = {name: [getattr(sample, name) for sample in batch] for name in schema.names}
                    writer.write_batch(pa.RecordBatch.from_pydict(columns, schema=schema))
            # Of several processes that write the same samples, the last one's file stays.
            partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def _read(file: Path) -> CompiledSamples:
    samples: list[Sample] = []
    with pa.memory_map(str(file)) as source, pa.ipc.open_file(source) as reader:
        counts = json.loads(reader.schema.metadata[COUNTS])
        for index in range(reader.num_record_batches):
            samples += [Sample(**row) for row in reader.get_batch(index).to_pylist()]
    return CompiledSamples(**{**counts, "samples": samples})
