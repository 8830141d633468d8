"""Read LoRA adapters as PEFT saves them, and hand them on after checking that they fit their base.

PEFT keeps a stack of experts' factors flattened: A [r·E, K] with the expert as the slow index, B [O, r·E] with the
expert as the fast one. Two adapted parameters of one module nest: the first, gate_up, is under `base_layer`. An
adapter of one of them has no `base_layer` whichever it is, so the shapes decide.
"""

import json
import re
import shutil
from collections.abc import Mapping
from math import sqrt
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from gptoss_ft.adapters.peft_files import CONFIG_FILE, WEIGHTS_FILE, parse_key, read_config, read_factors
from gptoss_ft.errors import UserError
from gptoss_ft.export.deltas import LowRankDelta, check_deltas, weight_shapes
from gptoss_ft.files import whole_folder
from gptoss_ft.model.checkpoint import Checkpoint
from gptoss_ft.model.manifest import Manifest
from gptoss_ft.model.spec import GptOssSpec

COPIED = (CONFIG_FILE, WEIGHTS_FILE, "README.md")


def read_adapter(folder: Path, spec: GptOssSpec) -> dict[str, LowRankDelta]:
    """Read a PEFT LoRA adapter of a gpt-oss model of this spec as updates by HF weight name.

    Raises:
        UserError: if files or factors are missing or damaged, a key is unknown, a shape belongs to another base,
            values are not finite, or the adapter is more than plain LoRA (rsLoRA and rank or alpha patterns are
            understood).
    """
    folder = Path(folder)
    config = read_config(folder)
    pairs = _pair_factors(folder, read_factors(folder))
    shapes = weight_shapes(spec)
    deltas: dict[str, LowRankDelta] = {}
    for module, (up, down) in pairs.items():
        name, down, up = _resolve(folder, module, down, up, shapes)
        if name in deltas:
            raise UserError(f"{folder / WEIGHTS_FILE}: two pairs of factors have the shape of {name}")
        deltas[name] = LowRankDelta(down, up, _scaling(config, folder, name, down.shape[-2]))
    check_deltas(spec, deltas)
    return deltas


def export_adapter(folder: Path, out: Path, base: Checkpoint) -> Path:
    """Copy an adapter to the new folder `out` once it is known to fit `base`; returns `out`.

    Raises:
        UserError: as `read_adapter`, or if `out` exists; nothing is left behind.
    """
    read_adapter(folder, base.spec)
    files = [Path(folder) / name for name in COPIED if (Path(folder) / name).is_file()]
    with whole_folder(out, num_bytes=sum(file.stat().st_size for file in files)) as copy:
        for file in files:
            shutil.copyfile(file, copy / file.name)
        Manifest(copy).write("adapter")
    return Path(out)


def write_as_peft(deltas: Mapping[str, LowRankDelta], folder: Path) -> None:
    """Write updates, all of one rank and scaling, into `folder` as an adapter that stock PEFT loads."""
    tensors: dict[str, Tensor] = {}
    modules, parameters = [], []
    for name, delta in deltas.items():
        down, up, module = delta.A, delta.B, name.removesuffix(".weight")
        suffix = module.removeprefix("model.")
        if down.dim() == 3:
            parameters.append(suffix)
            module = module.rpartition(".")[0]
            if name.endswith("gate_up_proj") and f"{module}.down_proj" in deltas:
                module += ".base_layer"
            down, up = down.flatten(0, 1), up.permute(1, 2, 0).flatten(1, 2)
        else:
            modules.append(suffix)
        for factor, tensor in (("A", down), ("B", up)):
            tensors[f"base_model.model.{module}.lora_{factor}.weight"] = tensor.contiguous()
    delta = next(iter(deltas.values()))
    rank = delta.A.shape[-2]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": delta.scaling * rank}
    config |= {"target_modules": modules, "target_parameters": parameters or None, "task_type": "CAUSAL_LM"}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")


def _pair_factors(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """B and A by module, nested ones under `….experts.base_layer`."""
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = parse_key(folder / WEIGHTS_FILE, key)
        factors.setdefault(match["module"], {})[match["factor"]] = tensor
        if tensor.dim() != 2:
            raise UserError(f"{folder / WEIGHTS_FILE}: {key} has shape {list(tensor.shape)} where a matrix is expected")
    for module, found in factors.items():
        if len(found) < 2:
            raise UserError(f"{folder / WEIGHTS_FILE}: {module} has only lora_{next(iter(found))}")
    return {module: (found["B"], found["A"]) for module, found in factors.items()}


def _resolve(
    folder: Path, module: str, down: Tensor, up: Tensor, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[str, Tensor, Tensor]:
    """The weight that a module's factors belong to, with A and B in plain orientation."""
    stem = module.removesuffix(".base_layer")
    candidates = [f"{stem}.gate_up_proj", f"{stem}.down_proj"] if stem.endswith("experts") else [f"{stem}.weight"]
    for name in candidates:
        *experts, rows, columns = shapes.get(name, (0, 0))
        num_experts = experts[0] if experts else 1
        if (down.shape[1], up.shape[0]) != (columns, rows) or down.shape[0] != up.shape[1]:
            continue
        if down.shape[0] % num_experts:
            break
        if experts:
            down = down.unflatten(0, (num_experts, -1))
            up = up.unflatten(1, (-1, num_experts)).permute(2, 0, 1)
        return name, down, up
    wanted = " or ".join(str(list(shapes[name])) for name in candidates if name in shapes) or "no such layer"
    raise UserError(
        f"{folder / WEIGHTS_FILE}: {module} has A {list(down.shape)}, B {list(up.shape)} where the base has {wanted}: "
        "it was trained on another base"
    )


def _scaling(config: Mapping[str, Any], folder: Path, name: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) with rsLoRA, by PEFT's patterns."""
    key = name if name.endswith(("gate_up_proj", "down_proj", "router.weight")) else name.removesuffix(".weight")
    wanted = _matching(config.get("rank_pattern") or {}, key, config["r"])
    if rank != wanted:
        raise UserError(f"{folder / WEIGHTS_FILE}: {name} has rank {rank} where {CONFIG_FILE} says {wanted}")
    alpha = _matching(config.get("alpha_pattern") or {}, key, config["lora_alpha"])
    return float(alpha) / (sqrt(rank) if config.get("use_rslora") else rank)


def _matching(patterns: Mapping[str, float], key: str, default: float) -> float:
    return next((value for pattern, value in patterns.items() if re.fullmatch(rf"(.*\.)?({pattern})", key)), default)
