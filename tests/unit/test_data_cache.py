"""Compiled samples kept between runs: the same until anything changes, whoever else writes or dies meanwhile."""

import json
import os
import subprocess
import sys
import time

import pytest

from gptoss_ft.cli import main
from gptoss_ft.config.schema import DataConfig
from gptoss_ft.config.values import OnError
from gptoss_ft.data import cache
from gptoss_ft.data.cache import cached, remove_unused, writable_folder
from gptoss_ft.data.dataset import compile_samples
from gptoss_ft.data.skipped import SkippedRows
from gptoss_ft.errors import ConfigError, UserError
from gptoss_ft.recipes.samples import compile_rows

TURN = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
DAY = 24 * 3600


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": TURN * 2}) + "\n" for _ in range(3)))
    return path


@pytest.fixture
def through_cache(path, tmp_path):
    """Compiles through a cache; `said` has a line for each time that samples were compiled, and what was announced."""

    def through_cache(settings="a"):
        def compile(out):
            through_cache.said.append(f"compiled {settings}")
            return compile_samples([path], max_length=512, out=out)

        return cached(tmp_path / "cache", [path], settings, compile, announce=through_cache.said.append)

    through_cache.said = []
    through_cache.folder = tmp_path / "cache"
    return through_cache


def kept(folder):
    return [file for file in folder.iterdir() if file.suffix == ".arrow"]


def test_the_cache_gives_the_same_samples_until_anything_changes(through_cache, path, monkeypatch):
    first = through_cache()
    again = through_cache()
    assert (list(again.samples), str(again)) == (list(first.samples), str(first)) and len(first.samples) == 6
    (file,) = kept(through_cache.folder)
    compiled, said = through_cache.said
    assert compiled == "compiled a" and str(file) in said and "data.cache=false" in said
    through_cache("b")
    assert len(kept(through_cache.folder)) == 2
    path.write_text(path.read_text() * 2)
    assert through_cache().rows == 6 and len(kept(through_cache.folder)) == 3
    monkeypatch.setattr(cache, "CODE", ("data",))
    through_cache()
    assert len(kept(through_cache.folder)) == 4
    assert not [file for file in through_cache.folder.iterdir() if "partial" in file.name]


def test_a_damaged_file_is_written_anew(through_cache):
    expected = list(through_cache().samples)
    (file,) = kept(through_cache.folder)
    for content in (b"", file.read_bytes()[:-100], b"x" * 1000):
        file.write_bytes(content)
        assert list(through_cache().samples) == expected
        assert list(through_cache().samples) == expected
    assert through_cache.said.count("compiled a") == 4


def test_samples_in_use_outlive_their_file(through_cache):
    samples = through_cache().samples
    expected = list(samples)
    remove_unused(through_cache.folder, days=0)
    assert kept(through_cache.folder) == [] and list(samples) == expected


def test_a_failure_keeps_nothing(path, tmp_path):
    with pytest.raises(UserError, match="no sample is left"):
        cached(tmp_path / "cache", [path], 0, lambda out: compile_samples([path], max_length=2, out=out))
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".lock"]


def test_hub_data_sets_are_not_kept(tmp_path):
    compiled = []
    for _ in range(2):
        cached(tmp_path / "cache", ["hf://a/b"], 0, compiled.append)
    assert compiled == [None, None] and not (tmp_path / "cache").exists()


def test_rows_that_change_meanwhile_are_not_kept(path, tmp_path):
    def compile(out):
        path.write_text(path.read_text() * 2)
        return compile_samples([path], max_length=512, out=out)

    assert cached(tmp_path / "cache", [path], 0, compile).rows == 6
    assert kept(tmp_path / "cache") == []


def test_skipped_rows_are_reported_each_time(path, tmp_path):
    path.write_text(path.read_text() * 10 + '{"messages": 1}\n')
    cfg = DataConfig(path=[str(path)], on_error=OnError.skip, cache_dir=str(tmp_path / "cache"))
    for _ in range(2):
        with SkippedRows(tmp_path / "skipped.jsonl") as skipped:
            compiled = compile_rows(cfg.path, cfg, skipped=skipped)
        assert (compiled.rows, len(compiled.samples), skipped.count) == (30, 60, 1)
        assert (tmp_path / "skipped.jsonl").is_file()
    assert kept(tmp_path / "cache") == []


def test_the_cache_is_on_unless_it_is_switched_off(path, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cache, "default_folder", lambda: tmp_path / "user")
    on, off = DataConfig(path=[str(path)]), DataConfig(path=[str(path)], cache=False)
    compile_rows(off.path, off)
    assert not (tmp_path / "user").exists()
    compile_rows(on.path, on)
    compile_rows(on.path, on, verbose=True)
    (line,) = capsys.readouterr().out.splitlines()
    assert str(kept(tmp_path / "user")[0]) in line
    with pytest.raises(ConfigError, match=r"data\.cache_dir must be null with data\.cache=false"):
        DataConfig(path=[str(path)], cache=False, cache_dir="x")


def test_a_home_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(cache, "default_folder", lambda: tmp_path / "file" / "samples")
    assert writable_folder(None).is_relative_to(cache.tempfile.gettempdir())
    with pytest.raises(UserError, match="cannot be written"):
        cached(writable_folder(str(tmp_path / "file" / "x")), [tmp_path / "file"], 0, compile_samples)


def test_a_user_without_a_home_is_no_error(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as it is where nobody has that user's number
    assert writable_folder(None).is_relative_to(cache.tempfile.gettempdir())


def test_what_a_run_is_writing_survives_a_clearing(path, tmp_path):
    def compile(out):
        def clear(text):
            (tmp_path / "cache" / f"{out.name.rpartition('-')[0]}-999999999").touch()
            remove_unused(tmp_path / "cache", days=0)

        return compile_samples([path], max_length=512, out=out, announce=clear)

    assert len(cached(tmp_path / "cache", [path], 0, compile).samples) == 6
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".arrow"]


def test_rows_that_change_while_a_process_waits_are_not_kept(path, tmp_path, monkeypatch):
    key = cache._key

    def slow_key(*args):
        name = key(*args)
        path.write_text(path.read_text() * 2)
        return name

    monkeypatch.setattr(cache, "_key", slow_key)
    cached(tmp_path / "cache", [path], 0, lambda out: compile_samples([path], max_length=512, out=out))
    assert kept(tmp_path / "cache") == []


def test_old_samples_and_halves_go_when_new_ones_come(through_cache):
    through_cache()
    (old,) = kept(through_cache.folder)
    half, fresh = (through_cache.folder / f".{old.name}.partial-host-{number}" for number in (1, 2))
    for file, days in ((old, 31), (half, 2), (fresh, 0.5)):
        file.touch()
        os.utime(file, (time.time() - days * DAY,) * 2)
    through_cache("b")
    assert not old.exists() and not half.exists() and fresh.exists()
    through_cache("b")
    assert through_cache.said[-1].startswith("samples compiled before are used")


def test_the_cache_can_be_cleared(through_cache, capsys):
    through_cache()
    (file,) = kept(through_cache.folder)
    users = through_cache.folder / "mine.arrow"
    users.write_text("not ours")
    size = f"{file.stat().st_size / 1e6:.1f} MB freed"
    words = ["data", "clear", f"cache_dir={through_cache.folder}"]
    assert main([*words, "days=1"]) == 0 and file.exists()
    assert main(words) == 0 and list(through_cache.folder.iterdir()) == [users]
    assert [line.partition(": ")[2] for line in capsys.readouterr().out.splitlines()] == ["0.0 MB freed", size]
    assert main(["data", "clear", "cache_dir=/nowhere"]) == 0


COMPILING = """
import sys, time
from pathlib import Path
from gptoss_ft.data.cache import cached
from gptoss_ft.data.dataset import compile_samples

def compile(out):
    print("compiling", flush=True)
    out.write_bytes(b"half")
    while not Path(sys.argv[3]).exists():
        time.sleep(0.05)
    return compile_samples([sys.argv[1]], max_length=512, out=out)

print(len(cached(sys.argv[2], [sys.argv[1]], 0, compile, announce=lambda text: print(text, flush=True)).samples))
"""


def compiling(path, folder, go):
    """A process that compiles once the file `go` is there."""
    command = [sys.executable, "-c", COMPILING, str(path), str(folder), str(go)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_of_two_processes_one_compiles_and_the_other_waits(path, tmp_path):
    first = compiling(path, tmp_path / "cache", tmp_path / "go")
    assert first.stdout.readline() == "compiling\n"
    second = compiling(path, tmp_path / "cache", path)
    assert second.stdout.readline().startswith("another process")
    (tmp_path / "go").touch()
    assert first.communicate()[0] == "6\n"
    used, count = second.communicate()[0].splitlines()
    assert used.startswith("samples compiled before") and count == "6"


def test_a_killed_process_holds_nobody_up(path, tmp_path):
    first = compiling(path, tmp_path / "cache", tmp_path / "never")
    assert first.stdout.readline() == "compiling\n"
    first.kill()
    first.communicate()
    assert compiling(path, tmp_path / "cache", path).communicate()[0] == "compiling\n6\n"
