"""The loss, its normalisation, and the gradient audit, each against a direct computation."""

import pytest
import torch
from torch.nn import functional as F
from transformers import TrainingArguments

from gptoss_ft.adapters.attach import Targets, attach_adapters, lora_layers
from gptoss_ft.data.collate import PaddingCollator
from gptoss_ft.model.load import load_base
from gptoss_ft.training.audit import audit_gradients, watch_experts
from gptoss_ft.training.loss import num_loss_tokens, summed_loss, total_weight
from gptoss_ft.training.trainer import SftTrainer

SAMPLES = [
    {"input_ids": list(range(10, 10 + length)), "labels": [-100] * prompt + list(range(10 + prompt, 10 + length))}
    for length, prompt in ((12, 4), (20, 3), (9, 8), (15, 10), (11, 1), (17, 16), (8, 2), (13, 5))
]

# The same with a weight for every token, so that samples with few loss tokens can weigh more than those with many.
WEIGHTED = [
    {
        **sample,
        "loss_weights": [0.25 * (1 + number + at % 3) * (label != -100) for at, label in enumerate(sample["labels"])],
    }
    for number, sample in enumerate(SAMPLES)
]


@pytest.fixture
def model(small_bases):
    torch.manual_seed(0)
    targets = Targets.parse(["all", "router"], num_layers=2, num_experts=4)
    model, _ = attach_adapters(load_base(small_bases["mxfp4"], dtype=torch.float32), targets, r=4, alpha=8)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            B = layer.lora_B["default"].weight
            B.copy_(0.1 * torch.randn(B.shape, generator=generator))
    return model


def collate(samples):
    return PaddingCollator(pad_token_id=0)(samples)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(got, expected):
    assert got.keys() == expected.keys()
    for name in expected:
        assert (got[name] - expected[name]).norm() <= 1e-4 * expected[name].norm(), name


def test_summed_loss_equals_cross_entropy_over_all_logits(model):
    batch = collate(SAMPLES[:4])
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    truth = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
    check_summed_loss(model, batch, truth)


def check_summed_loss(model, batch, truth):
    """`summed_loss` and its gradients are those of a loss that torch computed with the same parameters."""
    truth.backward()
    expected = gradients(model)
    model.zero_grad()
    loss = summed_loss(model, model.get_base_model(), batch, chunk_size=5)
    loss.backward()
    torch.testing.assert_close(loss, truth)
    assert_equal(gradients(model), expected)


def test_padding_changes_nothing(model):
    alone = sum(float(summed_loss(model, model.get_base_model(), collate([s])).detach()) for s in SAMPLES)
    together = summed_loss(model, model.get_base_model(), collate(SAMPLES))
    assert float(together.detach()) == pytest.approx(alone, rel=1e-5)
    assert num_loss_tokens(collate(SAMPLES)) == sum(num_loss_tokens(collate([s])) for s in SAMPLES)


def test_weighted_loss_is_the_weighted_sum_over_all_logits(model):
    batch = collate(WEIGHTED[:4])
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none")
    truth = (losses * batch["loss_weights"][:, 1:].flatten()).sum()
    check_summed_loss(model, batch, truth)
    assert total_weight(batch) == pytest.approx(float(batch["loss_weights"][:, 1:].sum()))


@pytest.mark.parametrize("samples", [SAMPLES, WEIGHTED], ids=["plain", "weighted"])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 2), (2, 4), (1, 8)])
def test_a_split_batch_takes_the_same_step_as_the_whole(model, tmp_path, batch_size, accumulation, samples):
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    def one_step(batch_size, accumulation):
        model.load_state_dict(start, strict=False)
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            learning_rate=1.0,
            lr_scheduler_type="constant",
            optim="sgd",
            max_grad_norm=0,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            remove_unused_columns=False,
            disable_tqdm=True,
        )
        trainer = SftTrainer(
            model=model, args=arguments, train_dataset=samples, data_collator=collate, loss_chunk_size=64
        )
        trainer.train()
        moved = {name: p.detach() - start[name] for name, p in model.named_parameters() if p.requires_grad}
        return trainer.state.log_history[0]["loss"], moved

    whole_loss, whole = one_step(8, 1)
    split_loss, split = one_step(batch_size, accumulation)
    assert split_loss == pytest.approx(whole_loss, rel=1e-5)
    assert_equal(split, whole)


@pytest.mark.parametrize("samples", [SAMPLES, WEIGHTED], ids=["plain", "weighted"])
def test_evaluation_is_the_mean_over_tokens_by_weight(model, tmp_path, samples):
    arguments = TrainingArguments(
        str(tmp_path), per_device_eval_batch_size=3, report_to=[], use_cpu=True, remove_unused_columns=False
    )
    trainer = SftTrainer(model=model, args=arguments, eval_dataset=samples, data_collator=collate, loss_chunk_size=64)
    metrics = trainer.evaluate()
    batch = collate(samples)
    expected = float(summed_loss(model, model.get_base_model(), batch).detach()) / total_weight(batch)
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["eval_tokens"] == num_loss_tokens(batch)


class TestAudit:
    def backward(self, model, samples=SAMPLES):
        watch_experts(model)
        model.train()
        summed_loss(model, model.get_base_model(), collate(samples)).backward()

    def test_counts_every_targeted_tensor(self, model):
        self.backward(model)
        audit = audit_gradients(model)
        assert audit.num_tensors == 2 * 7 * 2
        missed = sum(map(len, audit.experts_without_tokens.values()))
        assert audit.num_expert_tensors == 2 * (2 * 2 * 4 - missed)

    def test_names_a_tensor_without_gradient(self, model):
        self.backward(model)
        lora_layers(model)[1, "k_proj"].lora_A["default"].weight.grad = None
        with pytest.raises(ValueError, match="layer 1 k_proj lora_A has no gradient"):
            audit_gradients(model)

    def test_names_a_single_expert_without_gradient(self, model):
        self.backward(model, SAMPLES)
        layer = lora_layers(model)[0, "down_proj"]
        reached = int(layer.reached_E.nonzero()[0])
        layer.lora_B["default"].weight.grad.view(64, -1, 4)[..., reached] = 0
        with pytest.raises(ValueError, match=f"layer 0 down_proj lora_B expert {reached} has a gradient of zero"):
            audit_gradients(model)

    def test_before_the_first_step_only_B_can_have_a_gradient(self, model):
        with torch.no_grad():
            for layer in lora_layers(model).values():
                layer.lora_B["default"].weight.zero_()
        self.backward(model)
        assert audit_gradients(model).num_tensors == 2 * 7

    def test_lists_experts_that_only_padding_and_prompts_reach(self, model):
        # One loss token: in the last layer only the two experts of the position before it can learn.
        sample = {"input_ids": list(range(30)), "labels": [-100] * 29 + [29]}
        self.backward(model, [sample, {"input_ids": [7, 8], "labels": [-100, -100]}])
        audit = audit_gradients(model)
        assert len(audit.experts_without_tokens["layer 1 down_proj"]) == 2
        assert audit.experts_without_tokens["layer 1 gate_up_proj"] == audit.experts_without_tokens["layer 1 down_proj"]

    def test_gradient_checkpointing_reaches_the_same_experts(self, model):
        self.backward(model)
        plain = {key: layer.reached_E for key, layer in lora_layers(model).items() if hasattr(layer, "reached_E")}
        expected = gradients(model)
        model.zero_grad()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.backward(model)
        for key, reached in plain.items():
            assert torch.equal(lora_layers(model)[key].reached_E, reached)
        assert_equal(gradients(model), expected)
