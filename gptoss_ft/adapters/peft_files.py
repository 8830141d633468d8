"""The files of a LoRA adapter as PEFT saves it, for everything that reads one."""

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gptoss_ft.errors import UserError

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

# Of two adapted parameters of one module, the first one, gate_up, is under `base_layer`.
KEY = re.compile(
    r"base_model\.model\.(?P<module>model\.layers\.(?P<layer>\d+)\."
    r"(?:self_attn\.(?P<attention>[qkvo]_proj)|mlp\.(?:(?P<router>router)|experts(?P<inner>\.base_layer)?)))"
    r"\.lora_(?P<factor>[AB])\.weight"
)

# What leaves the factors plain LoRA, or is understood by all readers. Every other setting, also of a PEFT that is not
# written yet, has to be off.
UNDERSTOOD = {
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights"),
    *("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern"),
    # About training alone.
    *("lora_dropout", "inference_mode", "eva_config", "runtime_config", "ensure_weight_tying"),
    # Names of things, and a number that means nothing without use_qalora.
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
    *("megatron_core", "qalora_group_size"),
}
OFF: tuple[object, ...] = (None, False, "none", [], {})
# Others take part of the base weight into the factors, or may.
PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of plain LoRA.

    Raises:
        UserError: if it, or the file of weights, is missing or damaged, or asks for more than plain LoRA.
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}: give the folder of a PEFT adapter saved with safetensors")
    file = folder / CONFIG_FILE
    try:
        config = json.loads(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON ({error}): copy it again, or train again") from error
    if not isinstance(config, dict):
        raise UserError(f"{file} does not hold a JSON object: save the adapter again")
    if config.get("peft_type") != "LORA":
        raise UserError(f"{file}: peft_type is {config.get('peft_type')!r}; only LORA is understood")
    missing = [key for key in ("r", "lora_alpha") if not isinstance(config.get(key), int | float)]
    if missing:
        raise UserError(f"{file}: {' and '.join(missing)} missing or no number")
    for key, value in config.items():
        if key not in UNDERSTOOD and value not in OFF:
            raise UserError(f"{file}: {key}={value!r} is more than plain LoRA and not supported")
    if (init := config.get("init_lora_weights", True)) not in PLAIN_INITS:
        raise UserError(
            f"{file}: init_lora_weights={init!r} may have changed the base weights, so that the factors do not fit the "
            "checkpoint: save the adapter converted to plain LoRA"
        )
    return config


def read_factors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the file of weights.

    Raises:
        UserError: if it is damaged or empty.
    """
    file = folder / WEIGHTS_FILE
    try:
        factors = load_file(file)
    except SafetensorError as error:
        raise UserError(f"{file} is truncated or damaged ({error}): copy it again, or train again") from error
    if not factors:
        raise UserError(f"{file} holds no LoRA factors")
    return factors


def parse_key(file: Path, key: str) -> re.Match[str]:
    """The parts of a factor's name, see `KEY`.

    Raises:
        UserError: if it is none of a gpt-oss layer.
    """
    match = KEY.fullmatch(key)
    if match is None:
        raise UserError(f"{file}: {key} is no LoRA factor of a gpt-oss layer")
    return match
