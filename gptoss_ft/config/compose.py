"""Hydra: a preset or a user's YAML file, with presets chosen for its sections, as one tree of plain values."""

from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException, MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from gptoss_ft.config.catalog import CONFIGS, choices, did_you_mean, path_fault, presets
from gptoss_ft.errors import ConfigError


def is_file(name: str) -> bool:
    """Whether `config=name` is a YAML file rather than a preset."""
    return "/" in name or "\\" in name or name.endswith((".yaml", ".yml"))


def compose_presets(name: str, chosen: list[tuple[str, str]]) -> dict[str, Any]:
    """The nested values of a preset or file with presets chosen for its sections; interpolations stay."""
    folder, stem = CONFIGS, name
    overrides = []
    if is_file(name):
        path = Path(name)
        tree = read_yaml(path)
        if chosen and "defaults" not in tree:
            raise ConfigError(f"config={name}: {'='.join(chosen[0])} needs 'defaults: [train, _self_]' at its top")
        folder, stem = path.absolute().parent, path.name
        overrides.append(f"hydra.searchpath=[{quote(f'file://{CONFIGS.as_posix()}')}]")
    elif name not in presets():
        near = did_you_mean(name, presets()) or f": the presets are {', '.join(presets())}"
        raise ConfigError(f"config={name}: no such preset{near}")
    for group, choice in chosen:
        known = choices(group, folder)
        if choice not in known:
            near = did_you_mean(choice, known) or f": the presets are {', '.join(known)}"
            raise ConfigError(f"{group}={choice}: no such preset of '{group}'{near}")
        overrides.append(f"{group}={choice}")
    try:
        with initialize_config_dir(str(folder), version_base="1.3"):
            composed = compose(stem, overrides)
    except MissingConfigException as error:
        near = did_you_mean(Path(error.missing_cfg_file or "").name, error.options or presets())
        raise ConfigError(f"config={name}: {str(error).splitlines()[0].rstrip('.')}{near}") from None
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"config={name}: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise ConfigError(
            f"config={name}: its defaults include themselves: "
            "a file beside it hides the preset of the same name, rename that file"
        ) from None
    return cast(dict[str, Any], OmegaConf.to_container(composed))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a user's YAML file, before Hydra composes it."""
    if fault := path_fault(path, "file"):
        raise ConfigError(f"config={path}: {fault}")
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path))
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"config={path}: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict) or "hydra" in tree:
        raise ConfigError(f"config={path}: it must be a mapping of this program's keys")
    return cast(dict[str, Any], tree)


def quote(text: str) -> str:
    """A string literal of Hydra's override grammar."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
