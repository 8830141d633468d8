"""Nothing half-written ever stands under a final name."""

import errno
import os

import pytest

from gptoss_ft import files
from gptoss_ft.errors import UserError
from gptoss_ft.files import whole_folder, write_whole


def test_a_folder_appears_when_it_is_whole(tmp_path):
    with whole_folder(tmp_path / "deep" / "out") as partial:
        (partial / "a").write_text("1")
        assert not (tmp_path / "deep" / "out").exists()
    assert os.listdir(tmp_path / "deep") == ["out"]
    assert (tmp_path / "deep" / "out" / "a").read_text() == "1"


@pytest.mark.parametrize("failure", [RuntimeError("bug"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing(tmp_path, failure):
    with pytest.raises(type(failure)), whole_folder(tmp_path / "out") as partial:
        (partial / "a").write_text("1")
        raise failure
    assert os.listdir(tmp_path) == []


def test_an_empty_folder_is_filled_and_a_full_one_refused(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with whole_folder(out) as partial:
        (partial / "a").write_text("1")
    with pytest.raises(UserError, match="exists already"), whole_folder(out):
        pytest.fail("must not get here")
    assert (out / "a").read_text() == "1"


def test_a_disk_that_is_too_small_is_named_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match="are free on its disk"), whole_folder(tmp_path / "out", num_bytes=1 << 60):
        pytest.fail("must not get here")
    assert os.listdir(tmp_path) == []


def test_a_disk_that_fills_up_is_named_and_nothing_is_left(tmp_path):
    with pytest.raises(UserError, match=r"filled up while writing .*out"), whole_folder(tmp_path / "out") as partial:
        (partial / "a").write_text("1")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert os.listdir(tmp_path) == []


def test_other_system_errors_are_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(PermissionError), whole_folder(tmp_path / "out"):
        raise PermissionError(errno.EACCES, "Permission denied")


def test_a_file_is_replaced_whole_or_kept(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    write_whole(path, "old")

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.Path, "replace", fail)
    with pytest.raises(UserError, match="filled up"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.json"]
