"""Packed rows through the model: the loss and every gradient are the sums of the samples' own."""

import copy

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm

from gptoss_ft.data.collate import PaddingCollator
from gptoss_ft.data.packing import best_fit
from gptoss_ft.data.prefix_tree import plan_trees
from gptoss_ft.data.sample import Sample
from gptoss_ft.data.sample_table import SampleTable
from gptoss_ft.data.training_rows import PackedSamples, PackedTrees, SampleRows
from gptoss_ft.errors import UserError
from gptoss_ft.harmony.conversation import Conversation, Message
from gptoss_ft.harmony.generations import generations
from gptoss_ft.harmony.weights import LossRules
from gptoss_ft.model.documents import document_masks
from gptoss_ft.model.load import load_base
from gptoss_ft.training.loss import last_hidden_state, model_inputs, num_loss_tokens, summed_loss, total_weight

collate = PaddingCollator(pad_token_id=0)


@pytest.fixture(scope="module")
def samples():
    """Of lengths on both sides of the sliding window, which is 8 tokens wide."""
    random = torch.Generator().manual_seed(0)

    def sample(length, prompt):
        ids = torch.randint(1, 500, (length,), generator=random).tolist()
        weights = torch.rand(length - prompt, generator=random).mul(2).round(decimals=1).tolist()
        return Sample(ids, [0.0] * prompt + weights, "rows.jsonl:1", 0)

    return [sample(length, prompt) for length, prompt in ((21, 4), (9, 8), (3, 1), (17, 0), (12, 3), (7, 6), (5, 2))]


@pytest.fixture(scope="module")
def model(small_bases):
    """In fp64 throughout, where nothing but the order of sums can differ; every weight learns."""

    def norm(self, x):  # transformers' own computes in fp32, whatever the dtype
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    torch.manual_seed(0)
    model = load_base(small_bases["bf16"], precision="bf16", dtype=torch.float64, attn_implementation="eager")
    model.set_experts_implementation("eager")  # the default one has no fp64
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GptOssRMSNorm, "forward", norm)
        yield model.requires_grad_(True)


@pytest.fixture(scope="module")
def conversations():
    """Real generations of rows that fork: reasoning dropped, tool loops, one system message of its own.

    Their ids are renumbered to fit the small vocabulary.
    """
    thought, answer = (
        Message("assistant", "Let me see.", "analysis"),
        Message("assistant", "It is 4.", "final", weight=0.5),
    )
    call = Message("assistant", "{}", "commentary", "functions.f", "json")
    result = Message("tool", "4", "commentary", "assistant", name="functions.f")
    turn = (Message("user", "How much?"), thought, call, result, thought, answer)
    rows = [turn * 2, (*turn, Message("user", "Sure?"), answer), (Message("user", "Hello."), thought, answer)]
    numbers: dict[int, int] = {}
    found = []
    for row, messages in enumerate(rows):
        for g in generations(Conversation(messages), LossRules(missing_reasoning="low_effort", analysis=2.0)):
            ids = [numbers.setdefault(token, 1 + len(numbers)) for token in g.prompt_ids + g.completion_ids]
            weights = [0.0] * len(g.prompt_ids) + g.loss_weights
            found.append(Sample(ids, weights, f"rows.jsonl:{row}", g.index))
    assert len(numbers) < 500
    return found


def loss_and_gradients(model, batches):
    model.zero_grad()
    losses = [summed_loss(model, model, batch, chunk_size=7) for batch in batches]
    torch.stack(losses).sum().backward()
    return float(sum(losses).detach()), {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_sum_of(model, alone, packed):
    """`packed` gives the loss and the gradients of `alone`."""
    assert sum(map(total_weight, packed)) == pytest.approx(sum(map(total_weight, alone)))
    loss, gradients = loss_and_gradients(model, alone)
    packed_loss, packed_gradients = loss_and_gradients(model, packed)
    assert packed_loss == pytest.approx(loss, rel=1e-12)
    for name, expected in gradients.items():
        assert (packed_gradients[name] - expected).norm() <= 1e-11 * expected.norm(), name


def collated(rows, batch_size):
    rows = list(rows)
    return [collate(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]


def packed_batches(samples, capacity, batch_size):
    rows = best_fit([len(s.input_ids) for s in samples], capacity).rows
    return collated(PackedSamples(SampleTable.of(samples), rows), batch_size)


def tree_batches(samples, capacity, batch_size):
    table = SampleTable.of(samples)
    trees = list(plan_trees(table, capacity))
    return collated(PackedTrees(table, trees, best_fit([tree.size for tree in trees], capacity).rows), batch_size)


@pytest.mark.parametrize(("capacity", "batch_size"), [(21, 1), (40, 2), (128, 1)])
def test_packed_loss_and_gradients_are_the_sum_of_unpacked_ones(model, samples, capacity, batch_size):
    alone = collated(SampleRows(SampleTable.of(samples)), 1)
    packed = packed_batches(samples, capacity, batch_size)
    assert len(packed) < len(alone)
    assert sum(map(num_loss_tokens, packed)) == sum(map(num_loss_tokens, alone))
    assert_sum_of(model, alone, packed)


@pytest.mark.parametrize(("capacity", "batch_size"), [(200, 2), (512, 1)])
def test_trees_of_a_conversations_generations_too(model, conversations, capacity, batch_size):
    packed = tree_batches(conversations, capacity, batch_size)
    repeated = sum(len(sample.input_ids) for sample in conversations)
    assert sum(int(batch["attention_mask"].sum()) for batch in packed) < 0.75 * repeated
    assert_sum_of(model, collated(SampleRows(SampleTable.of(conversations)), 1), packed)


def test_random_trees_too(model):
    """With forks at every depth, forks in front of a loss, samples that begin others and samples that equal others."""
    random = torch.Generator().manual_seed(1)
    samples = []
    for number in range(12):
        length = int(torch.randint(2, 24, (), generator=random))
        ids = torch.randint(1, 3, (length,), generator=random).tolist()
        # Their sums are exact in fp32.
        weights = torch.randint(0, 64, (length,), generator=random).div(32).tolist()
        samples.append(Sample(ids, weights, f"rows.jsonl:{number // 6}", number))
    samples.insert(1, samples[0])
    packed = tree_batches(samples, 64, 1)
    assert sum(int(batch["attention_mask"].sum()) for batch in packed) < sum(len(s.input_ids) for s in samples)
    assert_sum_of(model, collated(SampleRows(SampleTable.of(samples)), 1), packed)


def test_flex_attention_is_given_the_same_masks(model, conversations):
    (batch, *_) = tree_batches(conversations, 512, 1)
    length = batch["input_ids"].shape[1]
    documents, positions, until = (batch[name] for name in ("document_ids", "position_ids", "visible_until"))
    flex = copy.copy(model.config)
    flex._attn_implementation = "flex_attention"
    eager_masks = document_masks(model.config, documents, positions, torch.float32, visible_until=until)
    flex_masks = document_masks(flex, documents, positions, torch.float32, visible_until=until)
    for kind, eager in eager_masks.items():
        allowed = create_mask(flex_masks[kind].mask_mod, 1, 1, length, length, device="cpu")
        assert torch.equal(allowed, eager == 0)
    assert not torch.equal(eager_masks["full_attention"], eager_masks["sliding_attention"])


def test_trees_are_refused_by_an_attention_that_has_no_masks(model):
    other = copy.copy(model.config)
    other._attn_implementation = "flash_attention_3"
    ids = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(UserError, match=r"attn_implementation=flash_attention_3 cannot.*data.share_prefixes=false"):
        document_masks(other, ids, ids, torch.float32, visible_until=ids)


@pytest.mark.parametrize("capacity", [200, 512])
def test_trees_in_our_attention(model, conversations, capacity, monkeypatch):
    """In fp64, where it is its reference; whose own kernels are held to that in `test_attention`."""
    alone = loss_and_gradients(model, collated(SampleRows(SampleTable.of(conversations)), 1))
    monkeypatch.setattr(model.config, "_attn_implementation", "gptoss_ft")
    loss, gradients = loss_and_gradients(model, tree_batches(conversations, capacity, 2))
    assert loss == pytest.approx(alone[0], rel=1e-12)
    for name, expected in alone[1].items():
        assert (gradients[name] - expected).norm() <= 1e-11 * expected.norm(), name


@pytest.mark.parametrize("implementation", ["eager", "gptoss_ft"])
def test_trees_in_fp32_too(implementation, small_bases, conversations):
    model = load_base(small_bases["mxfp4"], dtype=torch.float32, attn_implementation=implementation)
    model.get_input_embeddings().requires_grad_(True)
    found = []
    for batches in (collated(SampleRows(SampleTable.of(conversations)), 1), tree_batches(conversations, 512, 1)):
        loss = torch.stack([summed_loss(model, model, batch) for batch in batches]).sum()
        found.append((loss.detach(), *torch.autograd.grad(loss, model.get_input_embeddings().weight)))
    (loss, gradient), (tree_loss, tree_gradient) = found
    assert float(tree_loss) == pytest.approx(float(loss), rel=1e-5)
    assert (tree_gradient - gradient).norm() <= 1e-4 * gradient.norm()


@pytest.mark.parametrize("implementation", ["eager", "gptoss_ft"])
def test_in_fp32_too(implementation, small_bases, samples):
    model = load_base(small_bases["mxfp4"], dtype=torch.float32, attn_implementation=implementation)
    model.get_input_embeddings().requires_grad_(True)
    alone = [collate([row]) for row in SampleRows(SampleTable.of(samples))]
    losses = [float(summed_loss(model, model, batch).detach()) for batch in alone]
    packed = [float(summed_loss(model, model, batch).detach()) for batch in packed_batches(samples, 128, 1)]
    assert sum(packed) == pytest.approx(sum(losses), rel=1e-5)


def test_positions_alone_would_leak_between_documents(model, samples):
    """Why the masks are ours: transformers turns the positions and lets every document see those before it."""
    (batch,) = packed_batches(samples, 128, 1)
    inputs = model_inputs(model, batch)
    with torch.no_grad():
        exact = last_hidden_state(model, model, inputs)
        leaking = last_hidden_state(model, model, {**inputs, "attention_mask": None})
    first = batch["document_ids"][0] == 0
    torch.testing.assert_close(exact[0, first], leaking[0, first])
    assert (exact - leaking)[0, ~first].abs().max() > 0.01
