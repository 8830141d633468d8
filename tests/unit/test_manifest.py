"""manifest.json of exports: its hashes are those of the files, and it is the last file of a whole folder."""

import json
import os
import signal
import subprocess
import sys
from hashlib import sha256

import pytest

from gptoss_ft.errors import UserError
from gptoss_ft.export.merge import merge
from gptoss_ft.model.checkpoint import Checkpoint
from gptoss_ft.model.load import load_base
from gptoss_ft.model.manifest import Manifest, check_hashes, check_sizes


@pytest.fixture
def folder(tmp_path):
    """Two files, one of them hashed while it was written, in pieces."""
    manifest = Manifest(tmp_path)
    with manifest.open(tmp_path / "large") as file:
        for piece in (b"a" * 100_000, memoryview(b"b" * 10), b"", b"c"):
            file.write(piece)
    (tmp_path / "small").write_text("text")
    manifest.write("some")
    return tmp_path


def test_hashes_are_of_the_files_contents(folder):
    entries = json.loads((folder / "manifest.json").read_text())
    assert entries["format"] == "some" and entries["files"].keys() == {"large", "small"}
    for name, entry in entries["files"].items():
        content = (folder / name).read_bytes()
        assert entry == {"size": len(content), "sha256": sha256(content).hexdigest()}
    check_hashes(folder)


def test_faults_are_named(folder):
    (folder / "small").write_text("tex")
    for check in (check_sizes, check_hashes):
        with pytest.raises(UserError, match=r"small has 3 bytes where manifest\.json says 4: export again"):
            check(folder)
    (folder / "small").write_text("next")
    check_sizes(folder)
    with pytest.raises(UserError, match=r"small has another sha256"):
        check_hashes(folder)
    (folder / "small").unlink()
    with pytest.raises(UserError, match=r"small is missing, and manifest\.json names it"):
        check_sizes(folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"files": 3}', '{"files": {"small": {"size": "4"}}}'])
def test_a_damaged_manifest_is_named(folder, text):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        check_sizes(folder)


def test_a_folder_without_a_manifest_is_taken_as_it_is(tmp_path):
    (tmp_path / "file").write_text("text")
    check_hashes(tmp_path)


@pytest.mark.parametrize("format", ["bf16", "mxfp4", "original", "gguf", "gguf_q8_0"])
def test_large_files_are_not_read_again(small_bases, tmp_path, format, monkeypatch):
    read = []
    monkeypatch.setattr("gptoss_ft.model.manifest.file_digest", lambda file, _: read.append(file.name) or sha256())
    merge(Checkpoint.open(small_bases["mxfp4"]), {}, tmp_path / "out", format=format, progress=False)
    assert not [name for name in read if name.endswith((".safetensors", ".gguf"))]


def test_an_export_that_lost_its_end_is_not_loaded(small_bases, tmp_path):
    merge(Checkpoint.open(small_bases["mxfp4"]), {}, tmp_path / "out", format="mxfp4", progress=False)
    check_hashes(tmp_path / "out")
    config = tmp_path / "out" / "config.json"
    config.write_text(config.read_text()[:-1])
    with pytest.raises(UserError, match=r"config\.json has \d+ bytes where manifest\.json says"):
        load_base(tmp_path / "out")


KILLED = """
import sys, time
from pathlib import Path
from gptoss_ft.export.merge import merge
from gptoss_ft.model.checkpoint import Checkpoint

def raw(self, name):
    if "layers.1" in name:
        print("half", flush=True)
        time.sleep(60)
    return raw_at_once(self, name)

raw_at_once, Checkpoint.raw = Checkpoint.raw, raw
merge(Checkpoint.open(sys.argv[1]), {}, Path(sys.argv[2]), format=sys.argv[3], progress=False)
"""


@pytest.mark.parametrize("format", ["mxfp4", "gguf"])
def test_a_killed_merge_leaves_nothing_that_the_next_does_not_clean(small_bases, tmp_path, format):
    out, base = tmp_path / "out", small_bases["mxfp4"]
    command = [sys.executable, "-c", KILLED, str(base), str(out), format]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "half\n"
        os.kill(process.pid, signal.SIGKILL)
    assert not out.exists()
    (partial,) = tmp_path.iterdir()
    assert any(file.stat().st_size for file in partial.iterdir())
    merge(Checkpoint.open(base), {}, out, format=format, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    check_hashes(out)
