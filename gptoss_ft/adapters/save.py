"""Adapters on disk in PEFT's own layout: stock PEFT on a stock base loads what is written here, and the reverse."""

from dataclasses import replace
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import GptOssForCausalLM

from gptoss_ft.adapters.attach import ADAPTER_NAME, ROUTER, Attached, Targets, attach_config, lora_layers
from gptoss_ft.adapters.merged import computes_merged
from gptoss_ft.adapters.peft_files import CONFIG_FILE, WEIGHTS_FILE, parse_key, read_config, read_factors
from gptoss_ft.errors import UserError
from gptoss_ft.files import whole_folder
from gptoss_ft.model.experts import PROJECTIONS

MERGE_FIRST = """# Merge before serving

This adapter was trained through the rounding of its merge (`adapter.qat=true`). Beside a base that is not rounded it is
another model than the trained one: `gptoss-ft export run=RUN format=mxfp4 out=DIR` writes the trained one.
"""
PARAMETERS = {ROUTER: "mlp.router.weight", **{name: f"mlp.experts.{name}" for name in PROJECTIONS}}


def save_adapter(model: PeftModel, folder: Path) -> Path:
    """Write the active adapter as `adapter_model.safetensors` and `adapter_config.json`.

    Raises:
        UserError: if a tensor is not finite, naming it; nothing is written.
    """
    state = {name: tensor.detach().contiguous().cpu() for name, tensor in lora_state(model).items()}
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise UserError(f"training diverged: {name} holds NaN or infinite numbers; lower trainer.learning_rate")
    with whole_folder(folder, num_bytes=sum(tensor.nbytes for tensor in state.values())) as partial:
        save_file(state, partial / WEIGHTS_FILE, metadata={"format": "pt"})
        portable_config(model).save_pretrained(partial)
        if computes_merged(model):
            (partial / "README.md").write_text(MERGE_FIRST)
    return folder


def lora_state(model: PeftModel) -> dict[str, Tensor]:
    """The adapter's tensors by the names that PEFT saves; looks for no embeddings, which are never adapted."""
    return get_peft_model_state_dict(model, save_embedding_layers=False)


def portable_config(model: PeftModel) -> LoraConfig:
    """The adapter's config with the expert stacks under `target_parameters`, where stock PEFT looks for them."""
    layers = lora_layers(model)
    # Short names when every layer is adapted, as servers expect; else one suffix per layer.
    limited = len({layer for layer, _ in layers}) < model.config.num_hidden_layers
    modules, parameters = [], []
    for layer, name in layers:
        prefix = f"layers.{layer}." if limited else ""
        if name in PARAMETERS:
            parameters.append(prefix + PARAMETERS[name])
        else:
            modules.append(f"{prefix}self_attn.{name}" if limited else name)
    config = model.peft_config[ADAPTER_NAME]
    return replace(
        config,
        target_modules=list(dict.fromkeys(modules)),
        target_parameters=list(dict.fromkeys(parameters)) or None,
        # PEFT refuses parameters with a dropout, which only matters in training.
        lora_dropout=0.0 if parameters else config.lora_dropout,
        inference_mode=True,
    )


def load_adapter(model: GptOssForCausalLM, folder: Path | str) -> tuple[PeftModel, Attached]:
    """Attach the adapter saved in `folder` to a packed or dense base, through the layers that train it.

    Raises:
        UserError: if the folder is not a whole LoRA adapter of this base, naming the tensor at fault.
    """
    folder = Path(folder)
    read_config(folder)
    config = LoraConfig.from_pretrained(str(folder))
    state = read_factors(folder)
    targets = targets_of(state, config, num_layers=model.config.num_hidden_layers, where=folder)
    config.inference_mode = False
    config.base_model_name_or_path = model.name_or_path
    peft_model, attached = attach_config(model, config, targets)
    _check_state(peft_model, state, where=folder)
    set_peft_model_state_dict(peft_model, state)
    return peft_model.eval(), attached


def restore_adapter(model: PeftModel, folder: Path) -> None:
    """Give an attached adapter the numbers saved in `folder`; the same errors as `load_adapter`."""
    state = read_factors(folder)
    _check_state(model, state, where=folder)
    set_peft_model_state_dict(model, state)


def targets_of(state: dict[str, Tensor], config: LoraConfig, *, num_layers: int, where: Path) -> Targets:
    """What a saved adapter adapts in a base of `num_layers`, told by its tensor names."""
    found = set()
    for key in state:
        match = parse_key(where / WEIGHTS_FILE, key)
        name = match["attention"] or match["router"]
        if name is None:
            name = "gate_up_proj" if match["inner"] else _outer_projection(state, config, match["layer"])
        found.add((int(match["layer"]), name))
    layers, names = sorted({layer for layer, _ in found}), {name for _, name in found}
    if len(found) != len(layers) * len(names):
        raise UserError(f"{where}: every adapted layer must have the same targets, but they differ between layers")
    if layers[-1] >= num_layers:
        raise UserError(f"{where} adapts layer {layers[-1]}, but this base has layers 0 to {num_layers - 1}")
    every = len(layers) == num_layers
    return Targets.parse(sorted(names), num_layers=num_layers, num_experts=0, layers=None if every else layers)


def _outer_projection(state: dict[str, Tensor], config: LoraConfig, layer: str) -> str:
    # With both projections PEFT nests them; with one, only its config tells which it is.
    if f"base_model.model.model.layers.{layer}.mlp.experts.base_layer.lora_A.weight" in state:
        return "down_proj"
    named = [name for name in PROJECTIONS if any(p.endswith(f"experts.{name}") for p in config.target_parameters or ())]
    if len(named) != 1:
        raise UserError(f"{CONFIG_FILE} must name one expert projection under target_parameters, as its tensors do")
    return named[0]


def _check_state(model: PeftModel, state: dict[str, Tensor], *, where: Path) -> None:
    wanted = lora_state(model)
    for name in sorted(wanted.keys() | state.keys()):
        if name not in state:
            raise UserError(f"{where}: tensor {name} is missing")
        if name not in wanted:
            raise UserError(f"{where}: tensor {name} has no place in this base model")
        if state[name].shape != wanted[name].shape:
            got, need = tuple(state[name].shape), tuple(wanted[name].shape)
            raise UserError(
                f"{where}: {name} is {got}, but this base model needs {need}: it was trained on another base"
            )
        if not state[name].isfinite().all():
            raise UserError(f"{where}: {name} holds NaN or infinite numbers")
