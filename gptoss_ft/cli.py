"""`gptoss-ft COMMAND key=value ...`: everything heavy is imported only by the command that needs it."""

import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, cast

from gptoss_ft import __version__
from gptoss_ft.config import commands, schema
from gptoss_ft.config.catalog import choices, did_you_mean, groups, keys, presets, shown, summary
from gptoss_ft.errors import UserError

if TYPE_CHECKING:
    from gptoss_ft.model.spec import Layout

HELP = ("-h", "--help", "help")


@dataclass(frozen=True)
class Command:
    """A subcommand; `run` takes its words and returns the exit code."""

    run: Callable[[list[str]], int]
    config: type
    meaning: str
    examples: tuple[str, ...]


def init(words: list[str]) -> int:
    from gptoss_ft.config.load import load_command

    cfg = load_command(commands.InitCommand, words)
    from gptoss_ft.model.init import init_checkpoint

    init_checkpoint(cfg.model, Path(cfg.out), seed=cfg.seed, layout=cast("Layout", cfg.layout.value))
    print(cfg.out)
    return 0


def train(words: list[str]) -> int:
    from gptoss_ft.config.load import load_train_config

    cfg = load_train_config(words)
    if cfg.adapter.qat:
        from gptoss_ft.recipes import qat

        folder = qat.main(cfg)
    else:
        from gptoss_ft.recipes import sft

        folder = sft.main(cfg)
    # torchrun numbers its processes; one line is enough.
    if os.environ.get("RANK", "0") == "0":
        print(folder)
    return 0


def export(words: list[str]) -> int:
    from gptoss_ft.config.load import load_command

    cfg = load_command(commands.ExportCommand, words)
    from gptoss_ft.recipes import export

    print(export.main(cfg))
    return 0


def verify(words: list[str]) -> int:
    from gptoss_ft.config.load import load_command

    cfg = load_command(commands.VerifyCommand, words)
    from gptoss_ft.recipes import verify

    return 0 if verify.main(cfg) else 1


def doctor(words: list[str]) -> int:
    from gptoss_ft.config.load import load_command

    cfg = load_command(commands.DoctorCommand, words)
    from gptoss_ft.recipes import doctor

    return 0 if doctor.main(cfg) else 1


def data_check(words: list[str]) -> int:
    from gptoss_ft.config.load import load_command

    cfg = load_command(commands.DataCheckCommand, words)
    from gptoss_ft.recipes import data

    print(data.check(cfg))
    return 0


def data_render(words: list[str]) -> int:
    from gptoss_ft.config.load import load_command

    cfg = load_command(commands.DataRenderCommand, words)
    from gptoss_ft.recipes import data

    print(data.render(cfg))
    return 0


def data_preview(words: list[str]) -> int:
    from gptoss_ft.config.load import load_command

    cfg = load_command(commands.DataPreviewCommand, words)
    from gptoss_ft.recipes import data

    data.preview(cfg)
    return 0


def data_clear(words: list[str]) -> int:
    from gptoss_ft.config.load import load_command

    cfg = load_command(commands.DataClearCommand, words)
    from gptoss_ft.recipes import data

    print(data.clear(cfg))
    return 0


COMMANDS = {
    "init": Command(
        init,
        commands.InitCommand,
        "write a checkpoint with random weights in the published layout",
        ("gptoss-ft init model=tiny out=tiny", "gptoss-ft init model=gpt_oss_20b out=base layout=bf16 seed=1"),
    ),
    "train": Command(
        train,
        schema.TrainConfig,
        "train a LoRA adapter, and export and verify it if the config says so",
        (
            "gptoss-ft train config=quickstart",
            "gptoss-ft train config=lora_20b data.path=rows.jsonl adapter.r=32",
            "gptoss-ft train config=./mine.yaml data.path=[a.jsonl,b.jsonl] trainer.max_steps=500",
            "gptoss-ft train config=quickstart adapter=attention adapter.layers=[0,1]",
        ),
    ),
    "export": Command(
        export,
        commands.ExportCommand,
        "write a run's adapter, or the base model with the adapter merged in",
        ("gptoss-ft export run=runs/quickstart format=mxfp4 out=merged",),
    ),
    "verify": Command(
        verify,
        commands.VerifyCommand,
        "reopen an export with other programs and compare it with the trained model",
        ("gptoss-ft verify run=runs/quickstart path=merged",),
    ),
    "doctor": Command(
        doctor,
        commands.DoctorCommand,
        "check and time every kernel on this machine, and say what runs where and why; takes about half a minute",
        ("gptoss-ft doctor", "gptoss-ft doctor device=cpu out=doctor.json"),
    ),
    "data check": Command(
        data_check,
        commands.DataCheckCommand,
        "count what rows hold and would teach, and rank what looks wrong with them",
        ("gptoss-ft data check path=rows.jsonl", "gptoss-ft data check path=rows.jsonl on_error=skip max_length=8192"),
    ),
    "data render": Command(
        data_render,
        commands.DataRenderCommand,
        "write each generation's tokens, loss weights and text",
        ("gptoss-ft data render path=rows.jsonl out=samples.jsonl",),
    ),
    "data preview": Command(
        data_preview,
        commands.DataPreviewCommand,
        "show samples token by token, in the terminal or as a web page",
        ("gptoss-ft data preview path=rows.jsonl count=3", "gptoss-ft data preview path=rows.jsonl out=preview.html"),
    ),
    "data clear": Command(
        data_clear,
        commands.DataClearCommand,
        "remove the compiled samples that are kept between runs",
        ("gptoss-ft data clear", "gptoss-ft data clear days=7"),
    ),
}
# First words of the commands that have two.
GROUPS = sorted({name.partition(" ")[0] for name in COMMANDS if " " in name})


def main(argv: list[str] | None = None) -> int:
    """Run one command line and return its exit code: 1 and 2 after a one-line error, 130 when interrupted.

    Raises:
        SystemExit: with 143 when terminated.
    """
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in HELP:
        print(overview())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"gptoss-ft {__version__}")
        return 0
    num_words = 2 if words[0] in GROUPS else 1
    name, rest = " ".join(words[:num_words]), words[num_words:]
    if num_words == 2 and (len(words) == 1 or words[1] in HELP):
        print(overview(words[0]))
        return 0 if len(words) > 1 else 2
    if name not in COMMANDS:
        print(f"error: unknown command '{name}'{did_you_mean(name, COMMANDS) or ': see --help'}", file=sys.stderr)
        return 2
    if set(rest) & set(HELP):
        print(manual(name))
        return 0
    quiet_libraries()
    try:
        with ending_in_order():
            return COMMANDS[name].run(rest)
    except UserError as error:
        message, exit_code = f"error: {error}", error.exit_code
    except KeyboardInterrupt:
        message, exit_code = "interrupted", 130
    # Out here the failed frames are gone, and a progress bar that was open in them has ended its line.
    print(message, file=sys.stderr)
    return exit_code


@contextmanager
def ending_in_order() -> Iterator[None]:
    """Let SIGTERM unwind the stack, so that half-written folders are removed."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    # Python takes signals, and lets them be set, in its main thread only.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def quiet_libraries() -> None:
    """Drop the warnings that libraries give each other, about which a user can do nothing."""
    # PEFT 0.21 reads an attribute that transformers 5.23 has renamed.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    # bitsandbytes, which PEFT imports, looks on a CPU for a 4-bit inference kernel; nothing here is in 4 bits of its.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def overview(group: str = "") -> str:
    """The answer to `gptoss-ft --help`, or to `gptoss-ft data --help` and the like."""
    members = {name: command for name, command in COMMANDS.items() if name.startswith(group)}
    lines = ["usage: gptoss-ft COMMAND key=value ...", "", "Fine-tune gpt-oss through its packed MXFP4 experts.", ""]
    lines += [f"  {name:<12} {command.meaning}" for name, command in members.items()]
    lines += ["", "examples:", *(f"  {command.examples[0]}" for command in members.values())]
    lines += ["", "gptoss-ft COMMAND --help explains every key; gptoss-ft --version prints the version."]
    return "\n".join(lines)


def manual(name: str) -> str:
    """The answer to `gptoss-ft NAME --help`: examples, presets and every key, straight from the schema."""
    command = COMMANDS[name]
    lines = [f"usage: gptoss-ft {name} key=value ...", "", command.meaning, "", "examples:"]
    lines += [f"  {example}" for example in command.examples]
    if command.config is schema.TrainConfig:
        lines += ["", "presets (config=NAME, or config=./mine.yaml for your own):"]
        lines += [f"  {preset:<14} {summary(preset)}" for preset in presets()]
        lines += ["", "presets of a section (such as model=tiny):"]
        lines += [f"  {group:<14} {', '.join(choices(group))}" for group in groups()]
    lines += ["", "keys:"]
    for key in keys(command.config).values():
        default = "(required)" if key.required else shown(key.default)
        lines += [f"  {key.name}={default}", f"      {key.meaning} ({key.wanted}{' or null' * key.optional})"]
    return "\n".join(lines)
