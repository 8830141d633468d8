"""manifest.json of exports: its hashes are those of the files, and it is the last file of a whole folder."""

import json
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
