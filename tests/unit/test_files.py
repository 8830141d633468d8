"""Nothing half-written ever stands under a final name."""

import errno
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from gptoss_ft import files
from gptoss_ft.errors import UserError
from gptoss_ft.files import check_writable_parent, partial_of, whole_folder, write_whole


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


needs_proc = pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc, where even root makes no folders")


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A working folder with one file in it, to which nothing may be added."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("FILE/x", "FILE is a file"),
        ("FILE/x/y", "FILE is a file"),
        ("new/" + "n" * 300, "file name too long"),
        pytest.param("/proc/x", "no such file or directory", marks=needs_proc),
    ],
)
def test_a_place_where_no_folder_can_be_made_is_named(here, path, reason):
    message = re.escape(f"{path} cannot be written ({reason}): choose another place")
    with pytest.raises(UserError, match=message):
        check_writable_parent(path)
    assert os.listdir(here) == ["FILE"]
    with pytest.raises(UserError, match=message), whole_folder(path):
        pytest.fail("must not get here")


def test_a_file_is_no_folder_to_write_to(here):
    with pytest.raises(UserError, match=r"^FILE cannot be written \(FILE is a file\)"):
        check_writable_parent("FILE")
    with pytest.raises(UserError, match=r"^FILE exists already"), whole_folder("FILE"):
        pytest.fail("must not get here")


@pytest.mark.parametrize("path", [".", "new/.."])
def test_a_place_that_cannot_be_replaced_is_named(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    message = f"^{re.escape(path)} cannot be replaced by a new folder"
    with pytest.raises(UserError, match=message), whole_folder(path):
        pytest.fail("must not get here")


@pytest.mark.parametrize("path", ["FILE/x", pytest.param("/proc/x", marks=needs_proc)])
def test_a_file_that_cannot_be_written_is_named(here, path):
    with pytest.raises(UserError, match=f"^{path} cannot be written"):
        write_whole(path, "text")


@pytest.mark.parametrize("path", [".", "new", "new/deeper/x", "full"])
def test_a_usable_place_passes_and_stays_as_it_was(here, path):
    (here / "full").mkdir()
    (here / "full" / "a").touch()
    before = sorted(here.rglob("*"))
    check_writable_parent(path)
    assert sorted(here.rglob("*")) == before


UNFINISHED = """
import sys, time
from gptoss_ft.files import whole_folder
with whole_folder(sys.argv[1]):
    print(flush=True)
    time.sleep(60)
"""


def test_folders_of_ended_processes_are_removed_and_no_others(tmp_path):
    out = tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", UNFINISHED, str(out)], stdout=subprocess.PIPE) as writer:
        abandoned = partial_named_for(writer.pid, out)
        writer.stdout.readline()
        writer.kill()
    assert abandoned.exists()
    others = [partial_named_for(os.getppid(), tmp_path / "other"), partial_named_for(writer.pid, tmp_path / "other")]
    others.append(tmp_path / f".out.partial-another-machine-{writer.pid}")
    others.append(tmp_path / f".out.partial-{platform.node()}-2-{os.getppid()}")
    for folder in others:
        folder.mkdir()
    with whole_folder(out):
        assert not abandoned.exists()
    assert set(os.listdir(tmp_path)) == {"out", *(folder.name for folder in others)}


def test_of_two_writers_the_second_gives_way_to_the_first_by_its_number(tmp_path):
    out = tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", UNFINISHED, str(out)], stdout=subprocess.PIPE) as writer:
        first = partial_named_for(writer.pid, out)
        writer.stdout.readline()
        with pytest.raises(UserError, match=f"out is being written by process {writer.pid} "), whole_folder(out):
            pytest.fail("both write it")
        assert os.listdir(tmp_path) == [first.name]
        writer.kill()
    with whole_folder(out):
        assert not first.exists()


def test_a_number_that_another_process_got_since_blocks_nobody(tmp_path):
    abandoned = partial_named_for(os.getppid(), tmp_path / "out")
    abandoned.mkdir()
    started = psutil.Process(os.getppid()).create_time()
    os.utime(abandoned, (started - 10, started - 10))
    with whole_folder(tmp_path / "out"):
        assert not abandoned.exists()


def test_a_folder_that_came_to_be_meanwhile_stays(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="out exists already"), whole_folder(out) as folder:
        (folder / "a").touch()
        out.mkdir()
        (out / "of another machine").touch()
    assert os.listdir(tmp_path) == ["out"] and os.listdir(out) == ["of another machine"]


def partial_named_for(pid: int, path: Path) -> Path:
    """`partial_of(path)` as the process `pid` would have it."""
    own = partial_of(path)
    return own.with_name(own.name.removesuffix(str(os.getpid())) + str(pid))
