"""The command line: help without heavy imports, exit codes, and errors on one line of stderr."""

import signal
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tqdm import tqdm

from gptoss_ft import __version__, cli
from gptoss_ft.config import commands
from gptoss_ft.config.catalog import keys
from gptoss_ft.errors import UserError

HEAVY = ("torch", "transformers", "hydra", "omegaconf", "numpy", "yaml")


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["init", "-h"], ["--version"], ["trian"]])
def test_answers_without_heavy_imports(words):
    probe = f"import sys; from gptoss_ft.cli import main; main({words}); print(*(set({HEAVY}) & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert result.stdout.endswith("\n\n") or result.stdout == "\n"


def test_overview_names_every_command(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, command in cli.COMMANDS.items():
        assert f"  {name:<12} {command.meaning}" in text
    assert cli.main([]) == 2


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_manual_explains_every_key_and_teaches_by_example(name, capsys):
    assert cli.main([*name.split(), "--help"]) == 0
    text = capsys.readouterr().out
    for key in keys(cli.COMMANDS[name].config).values():
        assert f"  {key.name}=" in text
        assert key.meaning in text
    assert f"  gptoss-ft {name} " in text


def test_manual_shows_defaults_as_they_are_typed(capsys):
    cli.main(["train", "--help"])
    text = capsys.readouterr().out
    for line in (
        "run.dir=(required)",
        "adapter.targets=[attention,experts]",
        "adapter.layers=null",
        "run.resume=false",
    ):
        assert f"  {line}\n" in text
    assert "  quickstart     gptoss-ft train config=quickstart\n" in text


README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
EXAMPLES = [example for command in cli.COMMANDS.values() for example in command.examples]
EXAMPLES += [line.strip() for line in README.splitlines() if line.startswith("    gptoss-ft ")]


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_are_accepted(example, tmp_path, monkeypatch):
    from gptoss_ft.config import load

    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("run: {dir: r}\nmodel: {path: m}\n")
    _, name, *words = example.split()
    if name in cli.GROUPS:
        name = f"{name} {words.pop(0)}"
    if name == "train":
        load.compose_train_config(words)
    else:
        monkeypatch.setattr(load, "check_paths", lambda config: None)
        load.load_command(cli.COMMANDS[name].config, words)


def test_a_group_of_commands_lists_them(capsys):
    assert cli.main(["data", "--help"]) == 0
    assert cli.main(["data"]) == 2
    text = capsys.readouterr().out
    assert text.count("  data check   count") == 2 and "train" not in text
    assert cli.main(["data", "chekc"]) == 2
    assert "unknown command 'data chekc': did you mean 'data check'?" in capsys.readouterr().err


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"gptoss-ft {__version__}\n"


def test_unknown_command_names_the_nearest(capsys):
    assert cli.main(["trian", "config=quickstart"]) == 2
    assert capsys.readouterr().err == "error: unknown command 'trian': did you mean 'train'?\n"


@pytest.mark.parametrize(
    "words",
    [
        ["train", "config=quickstart", "trainer.max_step=3"],
        ["train", "config=./none.yaml"],
        ["init", "model=tiny"],
        ["export", "run=none", "format=mxfp4", "out=x"],
        ["verify", "run=none", "path=x"],
        ["data", "check", "path=none.jsonl"],
        ["data", "chekc", "path=none.jsonl"],
    ],
)
def test_bad_words_exit_2_on_one_line_and_write_nothing(words, tmp_path):
    command = [sys.executable, "-m", "gptoss_ft", *words]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [(UserError("the disk is full"), 1, "error: the disk is full\n"), (KeyboardInterrupt(), 130, "interrupted\n")],
)
def test_a_command_that_stops_says_why(raised, code, message, capsys, monkeypatch):
    def stop(words: list[str]) -> int:
        raise raised

    monkeypatch.setitem(cli.COMMANDS, "init", cli.Command(stop, commands.InitCommand, "", ()))
    assert cli.main(["init"]) == code
    assert capsys.readouterr().err == message


def test_an_error_starts_a_new_line_after_an_open_progress_bar(capsys, monkeypatch):
    def stop(words: list[str]) -> int:
        for _ in tqdm(range(10)):
            raise UserError("the disk is full")
        return 0

    monkeypatch.setitem(cli.COMMANDS, "init", cli.Command(stop, commands.InitCommand, "", ()))
    assert cli.main(["init"]) == 1
    shown = capsys.readouterr().err
    assert "0/10" in shown and shown.endswith("\nerror: the disk is full\n")


TERMINATED = """
import sys, time
from gptoss_ft import cli, files
from gptoss_ft.config import commands
def write(words):
    with files.whole_folder("out"):
        print(flush=True)
        time.sleep(60)
cli.COMMANDS["init"] = cli.Command(write, commands.InitCommand, "", ())
sys.exit(cli.main(["init"]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGTERM")
def test_termination_leaves_nothing_half_written(tmp_path):
    command = [sys.executable, "-c", TERMINATED]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.terminate()
        assert process.communicate(timeout=30) == (b"", b"")
    assert process.returncode == 143
    assert not list(tmp_path.iterdir())


def test_commands_run_outside_the_main_thread_and_leave_signals_alone(monkeypatch):
    monkeypatch.setitem(cli.COMMANDS, "init", cli.Command(len, commands.InitCommand, "", ()))
    before = signal.getsignal(signal.SIGTERM)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(cli.main, ["init", "a=b"]).result() == 1
    assert cli.main(["init", "a=b"]) == 1
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(("rank", "shown"), [(None, "runs/x\n"), ("0", "runs/x\n"), ("1", "")])
def test_one_process_of_many_prints_the_run_folder(rank, shown, capsys, monkeypatch):
    recipe = types.ModuleType("sft")
    recipe.main = lambda cfg: cfg.run.dir
    monkeypatch.setitem(sys.modules, "gptoss_ft.recipes.sft", recipe)
    monkeypatch.setattr("gptoss_ft.recipes.sft", recipe, raising=False)
    monkeypatch.delenv("RANK", raising=False)
    if rank:
        monkeypatch.setenv("RANK", rank)
    assert cli.main(["train", "config=quickstart", "run.dir=runs/x"]) == 0
    assert capsys.readouterr().out == shown


def test_bugs_are_not_hidden(monkeypatch):
    def fail(words: list[str]) -> int:
        raise ZeroDivisionError

    monkeypatch.setitem(cli.COMMANDS, "init", cli.Command(fail, commands.InitCommand, "", ()))
    with pytest.raises(ZeroDivisionError):
        cli.main(["init"])
