"""Training really learns: four rows by heart, said back token by token by every form of the trained model."""

import pytest
import torch
from peft import PeftModel
from transformers import GptOssForCausalLM

from gptoss_ft.adapters.save import load_adapter, save_adapter
from gptoss_ft.config.load import load_train_config, to_yaml
from gptoss_ft.data.schemas.messages import read_messages_row
from gptoss_ft.data.source import read_rows
from gptoss_ft.harmony.generations import generations
from gptoss_ft.model.load import load_base
from gptoss_ft.recipes import sft
from gptoss_ft.recipes.export import export_run
from gptoss_ft.training.run_folder import RunFolder


@pytest.fixture(scope="module")
def trained(tiny_base, four_rows, tmp_path_factory):
    """The trained model as it is in memory, and its run folder with adapter and config."""
    run = RunFolder(tmp_path_factory.mktemp("runs") / "overfit")
    cfg = load_train_config(
        [
            "config=quickstart",
            f"run.dir={run.path}",
            f"model.path={tiny_base}",
            f"data.path={four_rows}",
            "data.eval_fraction=0",
            "trainer.max_steps=30",
            "trainer.per_device_train_batch_size=4",
            "trainer.learning_rate=5e-3",
            "trainer.warmup_steps=5",
        ]
    )
    train_set, _ = sft.build_datasets(cfg.data, cfg.seed)
    model = sft.attach(sft.prepare_base(cfg.model, cfg.seed), cfg.adapter, cfg.seed)
    run.write_origin(to_yaml(cfg))
    sft.make_trainer(model, train_set, None, run, cfg.trainer, cfg.seed).train()
    save_adapter(model, run.adapter)
    return model.eval(), run.path


@pytest.fixture(scope="module")
def by_heart(four_rows):
    """(prompt, completion) of every generation."""
    samples = [g for _, row in read_rows(four_rows) for g in generations(read_messages_row(row))]
    assert len(samples) == 4
    return [(sample.prompt_ids, sample.completion_ids) for sample in samples]


def assert_says_them_back(model, by_heart):
    for prompt, completion in by_heart:
        ids = model.generate(
            input_ids=torch.tensor([prompt]),
            max_new_tokens=len(completion) + 4,
            do_sample=False,
            use_cache=True,
            eos_token_id=[200002, 200012],
            pad_token_id=199999,
        )
        assert ids[0, len(prompt) :].tolist() == completion


def test_the_trained_model(trained, by_heart):
    assert_says_them_back(trained[0], by_heart)


def test_the_reloaded_adapter_on_the_packed_base(trained, tiny_base, by_heart):
    model, _ = load_adapter(load_base(tiny_base, dtype=torch.float32), trained[1] / "adapter")
    assert_says_them_back(model, by_heart)


def test_the_adapter_in_stock_peft_on_a_stock_base(trained, tiny_base, by_heart):
    base = GptOssForCausalLM.from_pretrained(tiny_base, dtype=torch.float32, attn_implementation="eager")
    assert_says_them_back(PeftModel.from_pretrained(base, trained[1] / "adapter"), by_heart)


def test_the_bf16_export_in_stock_transformers(trained, tmp_path, by_heart):
    folder = export_run(trained[1], "bf16", tmp_path / "bf16")
    model = GptOssForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager")
    assert_says_them_back(model, by_heart)


def test_the_base_says_something_else(tiny_base, by_heart):
    with pytest.raises(AssertionError):
        assert_says_them_back(load_base(tiny_base, dtype=torch.float32), by_heart)
