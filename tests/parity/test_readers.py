"""Readers that open a model part by part give what the whole of it computes, and hold one part at a time."""

import gc
import weakref
from importlib.util import find_spec

import pytest
import torch
from transformers import GptOssForCausalLM

from gptoss_ft.adapters.attach import Targets, attach_adapters
from gptoss_ft.adapters.save import save_adapter
from gptoss_ft.export.gpt_oss_reader import open_with_gpt_oss
from gptoss_ft.export.transformers_reader import open_with_peft, open_with_transformers
from gptoss_ft.model.load import load_base

ROWS = [
    (torch.randint(0, 500, (length,), generator=torch.Generator().manual_seed(length)), torch.tensor(positions))
    for length, positions in ((20, [3, 18, 19]), (9, [8]))
]
PROGRAMS = {"transformers": (open_with_transformers, "mxfp4"), "gpt-oss": (open_with_gpt_oss, "original")}


def read(reader, advance=lambda share: None):
    return torch.cat(list(reader(ROWS, advance)))


@torch.no_grad()
def logits(model):
    return torch.cat([model(input_ids=ids[None], use_cache=False).logits[0, positions] for ids, positions in ROWS])


def whole(folder):
    return GptOssForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


@pytest.mark.parametrize("layout", ["mxfp4", "bf16"])
def test_parts_of_transformers_compute_what_its_whole_model_does(small_bases, layout):
    shares = []
    found = read(open_with_transformers(small_bases[layout]), shares.append)
    torch.testing.assert_close(found, logits(whole(small_bases[layout])), rtol=0, atol=1e-5)
    assert sum(shares) == pytest.approx(len(ROWS)) and len(shares) == 2 * len(ROWS)


@pytest.mark.parametrize("layout", ["mxfp4", "bf16", "original"])
def test_peft_adapts_the_layers_that_have_an_update_and_no_others(small_spec, small_bases, tmp_path, layout):
    """PEFT refuses a model in which it finds nothing to adapt, as one of two layers here."""
    targets = Targets.parse(["all"], num_layers=2, num_experts=small_spec.num_local_experts, layers=[1])
    model, _ = attach_adapters(load_base(small_bases["mxfp4"], dtype=torch.float32), targets, r=2, alpha=4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    save_adapter(model, tmp_path / "adapter")
    found = read(open_with_peft(small_bases[layout], tmp_path / "adapter"))
    torch.testing.assert_close(found, logits(model), rtol=0, atol=1e-5)
    assert not torch.allclose(found, logits(whole(small_bases["bf16"])), atol=1e-2)


@pytest.mark.parametrize("program", PROGRAMS)
def test_one_part_is_in_memory_at_a_time(small_spec, small_bases, program):
    open_with, layout = PROGRAMS[program]
    if program == "gpt-oss" and not find_spec("gpt_oss"):
        pytest.skip("the gpt-oss package is not installed")
    experts = small_spec.num_local_experts * 2 * small_spec.intermediate_size * small_spec.hidden_size
    reader, seen = open_with(small_bases[layout]), []

    def open_layer(number):
        assert not any(tensor() is not None for tensor in seen)
        layer = reader.open_layer(number)
        gc.collect()
        seen.extend(
            weakref.ref(found)
            for found in gc.get_objects()
            if isinstance(found, torch.nn.Parameter) and found.numel() == experts and not found.is_meta
        )
        return layer

    read(type(reader)(reader.spec, reader.open_embedding, open_layer, reader.open_head))
    # Each layer had one of this size.
    assert len(seen) == small_spec.num_hidden_layers
