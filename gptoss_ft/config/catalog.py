"""What a user can write: the keys of a command, the presets, and the nearest one to a misspelling."""

import difflib
import os
import types
import typing
from collections.abc import Iterable
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from enum import Enum
from glob import glob, has_magic
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

CONFIGS = Path(str(files("gptoss_ft.configs")))
WORDS = {
    str: ("text", "text"),
    int: ("an integer", "integers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "true or false"),
}


@dataclass(frozen=True)
class Key:
    """One settable key: `kind` is its type without `None` and without `list`."""

    name: str
    kind: type
    is_list: bool
    optional: bool
    required: bool
    default: Any
    meaning: str
    reads: Literal["file", "folder", "rows"] | None

    @property
    def wanted(self) -> str:
        """The accepted values as they follow "must be"."""
        if issubclass(self.kind, Enum):
            names = ", ".join(member.name for member in self.kind)
            return f"{'a list of names among' if self.is_list else 'one of'} {names}"
        one, many = WORDS[self.kind]
        return f"a list of {many}" if self.is_list else one


def keys(command: type, prefix: str = "") -> dict[str, Key]:
    """The keys of a config dataclass by dotted name, in order of declaration."""
    found: dict[str, Key] = {}
    for item in fields(command):
        name = prefix + item.name
        if is_dataclass(item.type):
            found |= keys(typing.cast(type, item.type), f"{name}.")
        else:
            found[name] = _key(name, item)
    return found


def _key(name: str, item: Field) -> Key:
    kind = typing.cast(Any, item.type)
    optional = isinstance(kind, types.UnionType)
    if optional:
        kind = next(part for part in typing.get_args(kind) if part is not types.NoneType)
    is_list = typing.get_origin(kind) is list
    if is_list:
        (kind,) = typing.get_args(kind)
    default = item.default_factory() if item.default_factory is not MISSING else item.default
    return Key(
        name=name,
        kind=kind,
        is_list=is_list,
        optional=optional,
        required=default is MISSING,
        default=default,
        meaning=item.metadata["meaning"],
        reads=item.metadata["reads"],
    )


def presets() -> list[str]:
    """Names that `config=` takes."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def groups() -> list[str]:
    """Sections that have presets of their own, such as `model=tiny`."""
    return sorted({path.parent.name for path in CONFIGS.glob("*/*.yaml")})


def choices(group: str, *folders: Path) -> list[str]:
    """Presets of a section, ours and those in the same place under `folders`."""
    return sorted({path.stem for root in (CONFIGS, *folders) for path in (root / group).glob("*.yaml")})


def summary(preset: str) -> str:
    """The command that runs a preset: its first line."""
    return (CONFIGS / f"{preset}.yaml").read_text(encoding="utf-8").splitlines()[0].lstrip("# ")


def shown(value: Any) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, list):
        return f"[{','.join(map(shown, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value) or "nothing"


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """`: did you mean 'x'?` for the option nearest to `word`, as a whole or in its last part; nothing if none is."""
    spellings = {option.rpartition(".")[2]: option for option in options} | {option: option for option in options}
    near = [hit for part in (word, word.rpartition(".")[2]) for hit in difflib.get_close_matches(part, spellings, n=1)]
    return f": did you mean '{spellings[near[0]]}'?" if near else ""


def rows_fault(path: str) -> str:
    """Why no rows can be read from `path`; a hub data set's name is taken at its word."""
    if path.startswith("hf://") or os.path.isdir(path) or (has_magic(path) and glob(path, recursive=True)):
        return ""
    return "no file matches" if has_magic(path) else path_fault(Path(path), "file")


def path_fault(path: Path, wanted: Literal["file", "folder"]) -> str:
    """Why `path` is no such thing, as it follows a colon; empty if it is one."""
    fits = os.path.isdir if wanted == "folder" else os.path.isfile
    if fits(path):
        return ""
    if os.path.exists(path):
        kind = "folder" if os.path.isdir(path) else "file" if os.path.isfile(path) else "device or pipe"
        return f"it is a {kind}, not a {wanted}"
    readable = os.path.isdir(path.parent) and os.access(path.parent, os.R_OK)
    others = [other for other in path.parent.iterdir() if fits(other)] if readable else []
    # By stem: a common extension is no likeness.
    stems = set(difflib.get_close_matches(path.stem, [other.stem for other in others]))
    near = difflib.get_close_matches(path.name, [other.name for other in others if other.stem in stems], n=1)
    return f"no such {wanted}" + (f": did you mean '{path.with_name(near[0])}'?" if near else "")
