"""The package as users get it: a wheel and an editable install, each in a new environment away from the checkout.

The dependencies are those of the running environment, lent through a path file: installing them again takes
gigabytes. The package itself must come from the new environment.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = (
    *("pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", "NOTICE"),
    *("gptoss_ft", "recipes", "configs", "kernels"),
)
LIBRARY = "gptoss_ft/kernels/libgptoss_ft_cpu.so"
# An environment need not be activated for its CMake and Ninja to be found.
PATH = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
PROBE = """
import json, torch
from gptoss_ft.kernels import cases, dispatch
draws = [cases.Draw(torch.device("cpu"), operation.dtypes[0]) for operation in dispatch.OPERATIONS]
calls = [op.case.call(draw, cases.AWKWARD) for op, draw in zip(dispatch.OPERATIONS, draws, strict=True)]
choices = [op.choose(*call.args, **call.kwargs) for op, call in zip(dispatch.OPERATIONS, calls, strict=True)]
print(json.dumps([(choice.implementation, choice.refused) for choice in choices]))
"""

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="the CPU library needs GCC or Clang"
)


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    """The output of a command that has to succeed, with `variables` in its environment."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"PATH": PATH, **variables}
    result = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def copy_checkout(folder: Path) -> Path:
    """The sources without anything that was built or installed from them."""
    folder.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def new_environment(folder: Path, *arguments: str | Path, **variables: str) -> Path:
    """The `bin` folder of a new environment that `pip install` with `arguments` filled with this package alone."""
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    binaries = folder / ("Scripts" if os.name == "nt" else "bin")
    target = sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)})
    # Only a path: path files that lie there are not read, so an editable install of this package stays out.
    Path(target, "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = next(binaries.glob("python*"))
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--force-reinstall", "--disable-pip-version-check"]
    run(python, "-m", "pip", "install", *options, *arguments, cwd=folder, **variables)
    return binaries


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    checkout = copy_checkout(folder / "checkout")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, checkout, cwd=folder)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installed(request, tmp_path_factory) -> tuple[Path, Path]:
    """The `bin` folder of an environment, and where its `gptoss_ft` has to be."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "wheel":
        return new_environment(folder / "venv", request.getfixturevalue("wheel")), folder / "venv"
    checkout = copy_checkout(folder / "checkout")
    return new_environment(folder / "venv", "--editable", checkout), checkout


@needs_compiler
def test_wheel_holds_python_presets_assets_and_the_library(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    expected = {
        f"{'' if source == 'gptoss_ft' else 'gptoss_ft/'}{path.relative_to(ROOT).as_posix()}"
        for source in ("gptoss_ft", "recipes", "configs", "kernels")
        for path in (ROOT / source).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and ROOT / "kernels" / "cpu" not in path.parents
    }
    assert {name for name in names if ".dist-info/" not in name} == {*expected, LIBRARY}
    assert any(name.endswith("/licenses/NOTICE") for name in names)


def test_wheel_is_for_any_python_on_this_platform(wheel):
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name.endswith(f"-py3-none-{platform}.whl")


@needs_compiler
def test_packed_experts_run_in_the_library(installed, tmp_path):
    binaries, _ = installed
    choices = json.loads(run(binaries / "python", "-c", PROBE, cwd=tmp_path))
    assert choices
    for implementation, refused in choices:
        assert implementation.startswith("cpu/") and "was not built" not in str(refused)


@needs_compiler
@pytest.mark.parametrize("installed", ["editable"], indirect=True)
def test_a_library_of_other_sources_does_not_run(installed, tmp_path):
    binaries, checkout = installed
    header = checkout / "kernels" / "cpu" / "grouped.h"
    built_from = header.read_bytes()
    header.write_bytes(built_from + b"// changed\n")
    try:
        choices = json.loads(run(binaries / "python", "-c", PROBE, cwd=tmp_path))
    finally:
        header.write_bytes(built_from)
    assert choices
    for implementation, refused in choices:
        assert implementation == "torch"
        assert all(f"`pip install -e {checkout}` again" in reason for _, reason, _ in refused)


@pytest.mark.parametrize("options", [[], ["--editable"]], ids=["plain", "editable"])
def test_without_a_compiler_the_package_installs_and_says_what_runs_instead(options, tmp_path):
    checkout = copy_checkout(tmp_path / "checkout")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("cmake", "ninja"):
        (tools / name).symlink_to(shutil.which(name, path=PATH))
    binaries = new_environment(tmp_path / "venv", *options, checkout, PATH=str(tools), CC="", CXX="")
    assert not list((tmp_path / "venv").rglob("libgptoss_ft_cpu*"))
    choices = json.loads(run(binaries / "python", "-c", PROBE, cwd=tmp_path))
    assert choices
    for implementation, refused in choices:
        assert implementation == "torch"
        assert all("was not built" in reason for _, reason, _ in refused)


def test_package_comes_from_the_new_environment(installed, tmp_path):
    binaries, home = installed
    probe = (
        "import json, gptoss_ft, gptoss_ft.recipes, gptoss_ft.configs, gptoss_ft.kernels.reference as reference;"
        "modules = (gptoss_ft, gptoss_ft.recipes, gptoss_ft.configs, reference);"
        "print(json.dumps([module.__file__ for module in modules]))"
    )
    for file in json.loads(run(binaries / "python", "-c", probe, cwd=tmp_path)):
        assert Path(file).resolve().is_relative_to(home.resolve())


def test_help_answers_anywhere(installed, tmp_path):
    binaries, _ = installed
    assert "gptoss-ft train config=quickstart" in run(binaries / "gptoss-ft", "--help", cwd=tmp_path)
    assert "  lora_20b " in run(binaries / "gptoss-ft", "train", "--help", cwd=tmp_path)


def test_init_writes_a_checkpoint_anywhere(installed, tmp_path):
    binaries, _ = installed
    run(binaries / "gptoss-ft", "init", "model=tiny", "out=base", cwd=tmp_path)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    assert config["vocab_size"] == 201_088
    assert (tmp_path / "base" / "tokenizer.json").is_file()


def test_quickstart_takes_its_first_step_anywhere(installed, tmp_path):
    binaries, _ = installed
    words = ["config=quickstart", "export=none", "trainer.max_steps=1", "run.dir=out", "data.eval_fraction=0.01"]
    run(binaries / "gptoss-ft", "train", *words, cwd=tmp_path)
    assert (tmp_path / "out" / "config.yaml").is_file()
    assert list((tmp_path / "out").rglob("adapter_model.safetensors"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
