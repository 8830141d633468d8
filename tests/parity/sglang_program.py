"""What SGLang makes of an adapter on a CPU; run by `test_sglang_adapter.py` with the interpreter of its environment.

python sglang_program.py CHECKPOINT ADAPTER PORT OUT.safetensors      the adapter's part of every buffer of its pool

Its model, its manager of adapters and its memory pool are what a server starts with; nothing is computed with them.
"""

import sys

import torch
from safetensors.torch import save_file
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.distributed import init_distributed_environment, initialize_model_parallel
from sglang.srt.lora.lora_manager import LoRAManager
from sglang.srt.lora.lora_registry import LoRARef
from sglang.srt.models import gpt_oss
from sglang.srt.runtime_context import SpawnRanks, publish
from sglang.srt.server_args import ServerArgs
from transformers import AutoConfig


def buffers(checkpoint: str, folder: str, port: str) -> dict[str, torch.Tensor]:
    """`MODULE.FACTOR.LAYER`, and the `scaling` of products of other modules than experts."""
    args = ServerArgs(
        model_path=checkpoint,
        device="cpu",
        dtype="float32",
        lora_paths=[f"adapter={folder}"],
        lora_strict_loading=True,
        moe_runner_backend="triton",
        attention_backend="triton",
        skip_tokenizer_init=True,
    )
    publish(args, role="scheduler", ranks=SpawnRanks(world_rank=0))
    init_distributed_environment(1, 0, f"tcp://127.0.0.1:{port}", 0, "gloo")
    initialize_model_parallel()
    config = AutoConfig.from_pretrained(checkpoint)
    model = gpt_oss.GptOssForCausalLM(config)
    ref = LoRARef(lora_name="adapter", lora_path=folder, pinned=False)
    manager = LoRAManager(model, config, 1, LoadConfig(), torch.float32, args, lora_paths=[ref])
    manager.fetch_new_loras({ref.lora_id})
    pool = manager.memory_pool
    slot = pool.get_buffer_id(ref.lora_id)
    found = {
        f"{name}.{factor}.{layer}": buffer[slot].clone()
        for factor, stacked in (("A", pool.A_buffer), ("B", pool.B_buffer))
        for name, layers in stacked.items()
        for layer, buffer in enumerate(layers)
    }
    return found | {"scaling": torch.tensor(manager.loras[ref.lora_id].scaling)}


def without_a_gpu() -> None:
    """Leave out what it insists on and no adapter meets: the kernel of rotary embeddings, and pinned memory."""
    gpt_oss.get_rope = lambda *_, **__: torch.nn.Identity()
    tensor = torch.tensor
    torch.tensor = lambda *args, pin_memory=False, **options: tensor(*args, **options)


if __name__ == "__main__":
    torch.set_default_dtype(torch.float32)
    without_a_gpu()
    save_file(buffers(*sys.argv[1:-1]), sys.argv[-1])
