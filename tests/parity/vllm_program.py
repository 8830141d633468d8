"""What vLLM makes of an export on a CPU; run by `test_vllm.py` with the interpreter of vLLM's own environment.

python vllm_program.py logprobs CHECKPOINT IDS.json OUT.safetensors                 of every token, given those before
python vllm_program.py adapter CHECKPOINT ADAPTER MAX_LORA_RANK OUT.safetensors     its stacked buffers, by module
"""

import json
import os
import sys

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="WARNING")

import torch
from safetensors.torch import save_file
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

OPTIONS = {"skip_tokenizer_init": True, "enforce_eager": True, "dtype": "bfloat16", "max_model_len": 128}


def logprobs(checkpoint: str, ids_file: str, out: str) -> None:
    with open(ids_file) as file:
        ids = json.load(file)
    with open(f"{checkpoint}/config.json") as file:
        vocab_size = json.load(file)["vocab_size"]
    llm = LLM(checkpoint, max_logprobs=vocab_size, **OPTIONS)
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=vocab_size, detokenize=False)
    (result,) = llm.generate([{"prompt_token_ids": ids}], sampling)
    rows = [[row[token].logprob for token in range(vocab_size)] for row in result.prompt_logprobs[1:]]
    save_file({"logprobs": torch.tensor(rows)}, out)


def adapter(checkpoint: str, folder: str, max_lora_rank: str, out: str) -> None:
    llm = LLM(checkpoint, enable_lora=True, max_lora_rank=int(max_lora_rank), **OPTIONS)
    assert llm.llm_engine.add_lora(LoRARequest("adapter", 1, folder))
    (tensors,) = llm.collective_rpc(buffers)
    save_file(tensors, out)


def buffers(worker):
    """The first adapter's part of every buffer, as `MODULE.BUFFER.SLICE`."""
    manager = worker.model_runner.lora_manager._adapter_manager
    found = {}
    for name, module in manager.modules.items():
        for buffer in ("lora_a", "lora_b", "w13_lora_a", "w13_lora_b", "w2_lora_a", "w2_lora_b"):
            for number, stacked in enumerate(getattr(module, f"{buffer}_stacked", ())):
                found[f"{name}.{buffer}.{number}"] = stacked[0].clone()
    return found


if __name__ == "__main__":
    {"logprobs": logprobs, "adapter": adapter}[sys.argv[1]](*sys.argv[2:])
