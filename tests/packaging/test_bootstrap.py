"""What `bootstrap.py` decides before it installs anything; `.ci/run` runs the whole of it."""

import importlib.util
import io
import os
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bootstrap():
    spec = importlib.util.spec_from_file_location("bootstrap", ROOT / "bootstrap.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_commands_are_jobs(bootstrap):
    named = re.findall(r"^    python3 bootstrap\.py (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert named == ["quickstart", "test"]
    assert set(named) <= set(bootstrap.EXTRAS)


def test_unknown_job_explains_itself(bootstrap, capsys):
    assert bootstrap.main(["unknown"]) == 2
    assert "bootstrap.py quickstart" in capsys.readouterr().out


@pytest.mark.parametrize("version", [(3, 10, 14), (3, 14, 0)])
def test_other_pythons_are_told_so(bootstrap, version, monkeypatch):
    monkeypatch.setattr(sys, "version_info", version)
    with pytest.raises(SystemExit, match=r"needs Python 3\.11, 3\.12 or 3\.13"):
        bootstrap.check_python()


def test_missing_ensurepip_names_the_package_to_install(bootstrap, tmp_path, monkeypatch):
    monkeypatch.setattr(bootstrap, "BIN", tmp_path)
    monkeypatch.setattr(bootstrap.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"apt install python3\.\d+-venv"):
        bootstrap.make_venv()


@pytest.mark.skipif(os.name == "nt", reason="the stand-in for nvidia-smi is a shell script")
class TestTorchBuild:
    @pytest.fixture(autouse=True)
    def linux_with_an_index(self, bootstrap, tmp_path, monkeypatch):
        monkeypatch.setattr(sys, "platform", "linux")
        monkeypatch.setattr(bootstrap, "CPU_INDEX", "http://127.0.0.1:9/whl/cpu")
        monkeypatch.setenv("PATH", str(tmp_path))

    def put_nvidia_smi(self, folder: Path, script: str) -> None:
        program = folder / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)

    def test_gpu_takes_the_default(self, bootstrap, tmp_path):
        self.put_nvidia_smi(tmp_path, "echo 'GPU 0: NVIDIA H100 (UUID: GPU-0)'")
        assert bootstrap.cpu_index() == []

    @pytest.mark.parametrize("script", ["exit 9", "echo 'No devices found.'"])
    def test_driver_without_a_gpu_takes_the_cpu_build(self, bootstrap, script, tmp_path, monkeypatch):
        self.put_nvidia_smi(tmp_path, script)
        monkeypatch.setattr(bootstrap.urllib.request, "urlopen", lambda url, timeout: io.BytesIO())
        assert bootstrap.cpu_index() == ["--extra-index-url", "http://127.0.0.1:9/whl/cpu"]

    def test_unreachable_index_leaves_the_choice_to_pip_and_says_so(self, bootstrap, capsys):
        assert bootstrap.cpu_index() == []
        assert "http://127.0.0.1:9/whl/cpu cannot be reached" in capsys.readouterr().out
