"""From `key=value` words and YAML presets to one frozen, checked config.

Hydra composes the presets; the schema is applied here, key by key, so that every error names its key.
"""

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar, cast

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

import gptoss_ft
from gptoss_ft.config.catalog import Key, did_you_mean, groups, keys, path_fault, presets, rows_fault, shown
from gptoss_ft.config.compose import compose_presets, is_file
from gptoss_ft.config.schema import TrainConfig
from gptoss_ft.errors import ConfigError

Config = TypeVar("Config")

ASSETS = Path(gptoss_ft.__file__).parent / "assets"


def load_train_config(words: list[str]) -> TrainConfig:
    """The config of `gptoss-ft train`, from a preset or YAML file, presets of sections, and keys.

    Raises:
        ConfigError: one line that names the word or key at fault and, where there is one, the nearest valid one.
    """
    config = compose_train_config(words)
    check_paths(config)
    return config


def compose_train_config(words: list[str]) -> TrainConfig:
    """`load_train_config` without looking for the files it names."""
    assigned = [split_word(word) for word in words]
    name = next((value for key, value in reversed(assigned) if key == "config"), "train")
    chosen = [(key, value) for key, value in assigned if key in groups()]
    rest = [(key, value) for key, value in assigned if key not in ("config", *groups())]
    return build(TrainConfig, compose_presets(name, chosen), rest, where=f"{name}: " if is_file(name) else "")


def load_command(command: type[Config], words: list[str]) -> Config:
    """The arguments of a command that has no presets; raises as `load_train_config` does."""
    config = build(command, {}, [split_word(word) for word in words], where="")
    check_paths(config)
    return config


def to_yaml(config: object) -> str:
    """The config with every default and interpolation written out; `config=` reads it back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def split_word(word: str) -> tuple[str, str]:
    """`key=value` in two."""
    name, equals, value = word.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_][\w.]*", name):
        hint = f": did you mean config={word}?" if word in presets() else ""
        raise ConfigError(f"'{word}' is not of the form key=value{hint}")
    return name, value


def build(command: type[Config], values: dict[str, Any], words: list[tuple[str, str]], *, where: str) -> Config:
    """Fill `command` from nested `values`, then `words`, and let it check itself; `where` precedes errors in values."""
    known = keys(command)
    config = empty(command)
    for name, value in flatten(values, known):
        assign(config, lookup(name, known, where), value, where)
    for name, text in words:
        key = lookup(name, known, "")
        assign(config, key, parse(key, text), "")
    missing = [key for key in known.values() if OmegaConf.is_missing(*owner(config, key.name))]
    if missing:
        raise ConfigError("missing " + ", ".join(f"{key.name} ({key.meaning})" for key in missing))
    OmegaConf.register_new_resolver("asset", asset_path, replace=True)
    try:
        return cast(Config, OmegaConf.to_object(config))
    except OmegaConfBaseException as error:  # an interpolation that leads nowhere, or to another type
        raise ConfigError(f"{where}{error.full_key}: {str(error).splitlines()[0]}") from None


def empty(command: type) -> DictConfig:
    """A writable OmegaConf node of the schema with defaults in place and required keys missing."""
    node = OmegaConf.structured(command)
    OmegaConf.set_readonly(node, False)
    for item in fields(command):
        if is_dataclass(item.type):
            node[item.name] = empty(cast(type, item.type))
    return node


def flatten(values: dict[str, Any], known: dict[str, Key], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values; descends where a section of the schema is, so that unknown names surface whole."""
    for part, value in values.items():
        name = f"{prefix}{part}"
        is_section = any(key.startswith(f"{name}.") for key in known)
        if is_section and (value is None or isinstance(value, dict)):
            yield from flatten(value or {}, known, f"{name}.")
        else:
            yield name, value


def lookup(name: str, known: dict[str, Key], where: str) -> Key:
    """The key of that name."""
    if name in known:
        return known[name]
    sections = {key.rpartition(".")[0]: key for key in reversed(known)}
    if name in sections:
        raise ConfigError(f"{where}'{name}' is a section: set {sections[name]} and the like")
    near = did_you_mean(name, [*known, *sections]) or ": --help lists them"
    raise ConfigError(f"{where}unknown key '{name}'{near}")


def parse(key: Key, text: str) -> Any:
    """The value that a word gives: text as it stands, anything else (and lists, and quoted text) by Hydra's grammar."""
    if key.optional and text == "null":
        return None
    if key.kind is str and not text.startswith(("[", "'", '"')):
        return text
    try:
        override = OverridesParser.create().parse_override(f"{key.name}={text}")
        if override.is_sweep_override():
            raise ConfigError(f"{key.name} takes one value, got {text}")
        return override.value()
    except HydraException:
        raise ConfigError(f"{key.name} must be {key.wanted}, got {text}") from None


def assign(config: DictConfig, key: Key, value: Any, where: str) -> None:
    """Set one key, converted to its type: a lone value serves for a list of one, an integral number for an integer."""
    if key.is_list and value is not None and not isinstance(value, list):
        value = [value]
    if key.kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    try:
        if value == "" or (key.is_list and "" in (value or [])):
            raise ValidationError("empty text")
        OmegaConf.update(config, key.name, value)
    except OmegaConfBaseException:
        raise ConfigError(
            f"{where}{key.name} must be {key.wanted}, got {shown(value)}{nearest_value(key, value)}"
        ) from None


def nearest_value(key: Key, value: Any) -> str:
    """A hint with the enum member that is most like the first one misspelt."""
    if not issubclass(key.kind, Enum):
        return ""
    names = [member.name for member in key.kind]
    wrong = [str(item) for item in (value if isinstance(value, list) else [value]) if item not in names]
    return did_you_mean(wrong[0], names) if wrong else ""


def owner(config: DictConfig, name: str) -> tuple[DictConfig, str]:
    """The node that holds a dotted key, and the key's last part."""
    section, _, last = name.rpartition(".")
    return (config[section] if section else config), last


def check_paths(config: Any) -> None:
    """Raise `ConfigError` for the first path that should exist and does not."""
    for key in keys(type(config)).values():
        section, _, last = key.name.rpartition(".")
        value = getattr(getattr(config, section) if section else config, last)
        if key.reads is None or value is None or (key.name == "model.path" and config.model.init):
            continue
        for path in value if key.is_list else [value]:
            if fault := rows_fault(path) if key.reads == "rows" else path_fault(Path(path), key.reads):
                raise ConfigError(f"{key.name}={path}: {fault}")


def asset_path(name: str) -> str:
    """`${asset:folder/file}`: the absolute path of a file that comes with the package."""
    return str(ASSETS / name)
