"""Exports that are killed, or whose disk gives out, with half of their weights written: nothing has the final name."""

import json
import shutil
import signal
import subprocess
import sys
from hashlib import sha256

import pytest

from gptoss_ft.cli import main

FORMATS = ("bf16", "mxfp4", "original", "gguf", "gguf_q8_0")

# Exports in each format, in a process of its own: forked, because imports take longer than all of them. Prints how each
# ended, what it said, and what is beside its output.
EXPORTS = """
import json, os, resource, signal, sys
from pathlib import Path
import gptoss_ft.recipes.export
from gptoss_ft.cli import main
from gptoss_ft.model.manifest import HashedFile

mode, run, folder, sizes = sys.argv[1], *map(Path, sys.argv[2:4]), json.loads(sys.argv[4])

def kill(out):
    os.kill(os.getpid(), signal.SIGKILL)

def fill(out):
    with open(out.parent / "filler", "ab", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass

def export(format, out):
    write = HashedFile.write

    def interrupted(file, data):
        if mode != "limit" and file.tell() >= sizes[format] // 2:
            {"kill": kill, "fill": fill}[mode](out)
        return write(file, data)

    HashedFile.write = interrupted
    if mode == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[format] // 2, sizes[format]))
    return main(["export", f"run={run}", f"format={format}", f"out={out}", "fidelity_tokens=0"])

ends = {}
for format in sizes:
    out, said = folder / format / "out", folder / f"{format}.txt"
    out.parent.mkdir()
    if (child := os.fork()) == 0:
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
        os._exit(export(format, out))
    _, status = os.waitpid(child, 0)
    (out.parent / "filler").unlink(missing_ok=True)
    there = sorted(path.name for path in out.parent.iterdir())
    ends[format] = (os.waitstatus_to_exitcode(status), said.read_text(), there)
print(json.dumps(ends))
"""
ON_A_DISK_OF_ITS_OWN = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
MOUNT = 'mount -t tmpfs -o size=16m none "$0" && exec "$@"'

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="processes are forked and killed")


@pytest.fixture(scope="module")
def run(make_run, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run") / "run")


def export(run, format, out):
    assert main(["export", f"run={run}", f"format={format}", f"out={out}", "fidelity_tokens=0"]) == 0
    return {file.name: sha256(file.read_bytes()).hexdigest() for file in out.iterdir()}


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """The hashes of what an undisturbed export writes, by format and file, and the size of its weights."""
    folder = tmp_path_factory.mktemp("whole")
    files = {format: export(run, format, folder / format) for format in FORMATS}
    sizes = {format: max(file.stat().st_size for file in (folder / format).iterdir()) for format in FORMATS}
    return files, sizes


def exports(mode, run, folder, sizes, around=()):
    command = [*around, sys.executable, "-c", EXPORTS, mode, str(run), str(folder), json.dumps(sizes)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def test_a_killed_export_leaves_nothing_that_the_next_does_not_clean(run, whole, tmp_path):
    files, sizes = whole
    ends = exports("kill", run, tmp_path, sizes)
    for format, (code, said, there) in ends.items():
        assert code == -signal.SIGKILL, said
        (partial,), parent = there, tmp_path / format
        assert partial.startswith(".out.partial-")
        assert max(file.stat().st_size for file in (parent / partial).iterdir()) >= sizes[format] // 4
        assert export(run, format, parent / "out") == files[format]
        assert [path.name for path in parent.iterdir()] == ["out"]


def test_a_file_larger_than_allowed_is_said_with_the_cure(run, whole, tmp_path):
    for format, (code, said, there) in exports("limit", run, tmp_path, whole[1]).items():
        assert (code, there) == (1, []), said
        error = f"error: {tmp_path / format / 'out'} is to hold a larger file than its disk or `ulimit -f` allows: "
        assert said.splitlines()[-1].startswith(error)


def test_a_disk_that_others_fill_is_said_with_the_cure(run, whole, tmp_path):
    if not shutil.which("unshare") or subprocess.run([*ON_A_DISK_OF_ITS_OWN, MOUNT, tmp_path, "true"]).returncode:
        pytest.skip("no disk can be mounted here")
    around = [*ON_A_DISK_OF_ITS_OWN, MOUNT, str(tmp_path)]
    for format, (code, said, there) in exports("fill", run, tmp_path, whole[1], around).items():
        assert (code, there) == (1, []), said
        error = f"error: the disk filled up while writing {tmp_path / format / 'out'}: free some room and run again"
        assert said.splitlines()[-1] == error
