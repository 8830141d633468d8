"""LoRA adapters as SGLang loads them beside a base, expert stacks included; read in the sources of 0.5.23.

SGLang drops what it has no place for with no more than a warning, so an export has only keys that it takes:

- `….mlp.experts.gate_up_proj.lora_A.weight` [E, r, K] and `….lora_B.weight` [E, 2·I, r], gate's rows before up's (it
  interleaves them itself), and `….mlp.experts.down_proj.…` likewise.
- q, k and v together: it stacks the three and takes none alone. Those without an update are zeros.
- gate_proj, up_proj and down_proj under `target_modules`: it adapts the experts only where all are named.
- One rank and one scaling, `lora_alpha` / `r`: it reads neither `use_rslora` nor patterns. Lower ranks are filled up
  with zeros, and B carries what differs from the common scaling.

Shapes: E experts · O out rows · K in columns · r rank · I intermediate size.
"""

import json
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, cat, float32, stack
from torch.nn.functional import pad

from gptoss_ft.adapters.peft_files import CONFIG_FILE, WEIGHTS_FILE, read_config, read_factors
from gptoss_ft.errors import UserError
from gptoss_ft.export.adapter import read_adapter
from gptoss_ft.export.deltas import LowRankDelta, check_deltas, weight_shapes
from gptoss_ft.files import whole_folder
from gptoss_ft.model.checkpoint import Checkpoint
from gptoss_ft.model.manifest import Manifest
from gptoss_ft.model.shards import Entry, write_safetensors
from gptoss_ft.model.spec import GptOssSpec, TensorSpec

PREFIX = "base_model.model."
KEY = re.compile(
    rf"{re.escape(PREFIX)}(?P<weight>model\.layers\.\d+\."
    r"(?:self_attn\.[qkvo]_proj|mlp\.experts\.(?:gate_up_proj|down_proj)))\.lora_(?P<factor>[AB])\.weight"
)
STACKED = ("q_proj", "k_proj", "v_proj")
EXPERT_MODULES = ["gate_proj", "up_proj", "down_proj"]


def export_adapter_sglang(folder: Path, out: Path, base: Checkpoint, *, progress: bool = True) -> Path:
    """Write a PEFT adapter of `base` for SGLang into the new folder `out`; returns `out`.

    Raises:
        UserError: as `read_adapter`; if it adapts the router; if `out` exists. Nothing is left behind.
    """
    deltas = read_adapter(folder, base.spec)
    routers = [name for name in deltas if name.endswith("router.weight")]
    if routers:
        raise UserError(
            f"{folder}: the adapter's target_parameters include the router ({routers[0]}), and SGLang applies no LoRA "
            "to it: train without router in adapter.targets, or export a merged format (mxfp4, bf16)"
        )
    deltas = _with_stacked_parts(base.spec, deltas)
    rank = max(delta.A.shape[-2] for delta in deltas.values())
    scaling = max(delta.scaling for delta in deltas.values()) or 1.0
    entries = list(_entries(deltas, rank, scaling))
    with whole_folder(out, num_bytes=sum(tensor.nbytes for _, tensor, _ in entries)) as whole:
        write_safetensors(whole / WEIGHTS_FILE, entries, progress=progress)
        config = _config(read_config(folder), deltas, rank, scaling * rank)
        (whole / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        Manifest(whole).write("adapter_sglang")
    return Path(out)


def is_adapter_sglang(folder: Path) -> bool:
    """Whether an adapter has experts under SGLang's names; without experts it is an adapter in PEFT's layout, too."""
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        return False
    try:
        with safe_open(file, framework="pt") as adapter:
            matches = [KEY.fullmatch(key) for key in sorted(adapter.keys())]
    except SafetensorError as error:
        raise UserError(f"{file} is truncated or damaged ({error}): copy it again, or export again") from error
    return any(match and ".experts." in match["weight"] for match in matches)


def read_adapter_sglang(folder: Path, spec: GptOssSpec) -> dict[str, LowRankDelta]:
    """Read such an adapter back as updates by HF weight name.

    Raises:
        UserError: if it is none of a gpt-oss model of this spec, naming the field or tensor at fault.
    """
    config, file = read_config(folder), folder / WEIGHTS_FILE
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_factors(folder).items():
        match = KEY.fullmatch(key)
        if not match:
            raise UserError(f"{file}: {key} is no tensor that SGLang takes for gpt-oss: export again")
        weight = match["weight"] if ".experts." in match["weight"] else f"{match['weight']}.weight"
        factors.setdefault(weight, {})[match["factor"]] = tensor
    deltas = {}
    for weight, found in factors.items():
        if len(found) < 2:
            raise UserError(f"{file}: {weight} has only lora_{next(iter(found))}: export again")
        if found["A"].shape[-2] != config["r"]:
            raise UserError(f"{file}: {weight} has rank {found['A'].shape[-2]} where {CONFIG_FILE} says {config['r']}")
        up = found["B"]
        if weight.endswith("gate_up_proj"):
            up = stack(up.chunk(2, dim=-2), dim=-2).flatten(-3, -2)
        deltas[weight] = LowRankDelta(found["A"], up, config["lora_alpha"] / config["r"])
    check_deltas(spec, deltas)
    return deltas


def _with_stacked_parts(spec: GptOssSpec, deltas: Mapping[str, LowRankDelta]) -> dict[str, LowRankDelta]:
    """With updates of zero for those of q, k and v that are missing beside another one."""
    complete, shapes = dict(deltas), weight_shapes(spec)
    for name, delta in deltas.items():
        stem, _, module = name.removesuffix(".weight").rpartition(".")
        for part in STACKED if module in STACKED else ():
            weight = f"{stem}.{part}.weight"
            rows, columns = shapes[weight]
            nothing = LowRankDelta(delta.A.new_zeros(1, columns), delta.B.new_zeros(rows, 1), delta.scaling)
            complete.setdefault(weight, nothing)
    return complete


def _entries(deltas: Mapping[str, LowRankDelta], rank: int, scaling: float) -> Iterator[Entry]:
    for name, delta in sorted(deltas.items()):
        key = f"{PREFIX}{name.removesuffix('.weight')}.lora_"
        yield f"{key}A.weight", _fp32(*delta.A.shape[:-2], rank, delta.A.shape[-1]), partial(_downs, delta, rank)
        yield f"{key}B.weight", _fp32(*delta.B.shape[:-1], rank), partial(_ups, name, delta, rank, scaling)


def _fp32(*shape: int) -> TensorSpec:
    return TensorSpec(float32, shape)


# Made when they are written, expert by expert: an adapter of gpt-oss-120b's experts would not fit into memory twice.
def _downs(delta: LowRankDelta, rank: int) -> Iterator[Tensor]:
    for down in delta.A.reshape(-1, *delta.A.shape[-2:]):
        yield pad(down.float(), (0, 0, 0, rank - len(down)))


def _ups(name: str, delta: LowRankDelta, rank: int, scaling: float) -> Iterator[Tensor]:
    for up in delta.B.reshape(-1, *delta.B.shape[-2:]):
        if name.endswith("gate_up_proj"):
            up = cat((up[0::2], up[1::2]))
        yield pad(up.float() * (delta.scaling / scaling), (0, rank - up.shape[-1]))


def _config(
    config: Mapping[str, object], deltas: Mapping[str, LowRankDelta], rank: int, alpha: float
) -> dict[str, object]:
    modules = {name.removesuffix(".weight").rpartition(".")[2] for name in deltas}
    experts = bool(modules & {"gate_up_proj", "down_proj"})
    attention = sorted(modules - {"gate_up_proj", "down_proj"})
    return {
        **config,
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": attention + EXPERT_MODULES * experts,
        "target_parameters": None,
    }
