"""The import contracts of pyproject.toml, held against the layout that is installed."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]

# An editable install answers for `gptoss_ft` before the path is searched, and its packages are scattered.
LINT = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "ScikitBuild" not in type(finder).__name__]
from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports
sys.exit(lint_imports(config_filename=sys.argv[1], no_cache=True) != EXIT_STATUS_SUCCESS)
"""


def assemble(folder: Path) -> None:
    """Copy the sources into `folder` as a wheel would lay them out."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for package, source in project["tool"]["scikit-build"]["wheel"]["packages"].items():
        for file in (ROOT / source).rglob("*.py"):
            copy = folder / package / file.relative_to(ROOT / source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy)
    # The linter follows regular packages only, and `kernels` is not one.
    for package in (folder / "gptoss_ft").rglob("*/"):
        (package / "__init__.py").touch()


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LINT, str(ROOT / "pyproject.toml")]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_imports_keep_the_contracts(tmp_path):
    assemble(tmp_path)
    result = lint(tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


def test_an_upward_import_breaks_them(tmp_path):
    assemble(tmp_path)
    (tmp_path / "gptoss_ft" / "config" / "upward.py").write_text("import gptoss_ft.recipes\nimport torch\n")
    result = lint(tmp_path)
    assert result.returncode != 0
    assert "gptoss_ft.config.upward -> gptoss_ft.recipes" in result.stdout
    assert "gptoss_ft.config.upward -> torch" in result.stdout
