"""Corrections of a layer's queries, keys and values, and of its router, for what the layers before it left."""

import pytest
import torch
from torch import nn
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter

from gptoss_ft.export.absorb import attention_corrections, router_correction
from gptoss_ft.export.ridge import best_ridge

H, O, T = 48, 32, 40
E, K = 16, 4
PARTS = {f"self_attn.{name}_proj.{part}" for name in "qkv" for part in ("weight", "bias")}


def layer():
    torch.manual_seed(0)
    found = nn.Module()
    found.input_layernorm, found.self_attn = nn.Identity(), nn.Module()
    for name in ("q_proj", "k_proj", "v_proj"):
        found.self_attn.add_module(name, nn.Linear(H, O).bfloat16())
    return found


@pytest.fixture
def draw():
    """A function that draws so many rows of both models, `[1, T, H]` each; part of the difference can be told."""
    generator = torch.Generator().manual_seed(0)
    apart, shift = 0.2 * torch.randn(H, H, generator=generator) * H**-0.5, 0.1 * torch.randn(H, generator=generator)

    def draw(num_rows, told=1.0):
        trained = [torch.randn(1, T, H, generator=generator) for _ in range(num_rows)]
        noise = [0.05 * torch.randn(1, T, H, generator=generator) for _ in range(num_rows)]
        merged = [x + told * (x @ apart + shift) + e for x, e in zip(trained, noise, strict=True)]
        return [x.bfloat16() for x in trained], [x.bfloat16() for x in merged]

    return draw


def missing(trained, merged, rows):
    x, x_merged = (torch.cat(parts, 1)[0] for parts in rows)
    with torch.no_grad():
        return float((trained.self_attn.k_proj(x).double() - merged.self_attn.k_proj(x_merged).double()).norm())


# Fewer and more tokens than columns.
@pytest.mark.parametrize("num_rows", [2, 30])
def test_what_inputs_tell_of_the_difference_is_made_good(draw, num_rows):
    trained, merged = layer(), layer()
    fresh = draw(50)
    before = missing(trained, merged, fresh)
    found = attention_corrections(trained, merged, *draw(num_rows))
    assert found.keys() == PARTS
    for name, values in found.items():
        assert values.dtype == torch.bfloat16
        merged.get_parameter(name).data = values
    assert missing(trained, merged, fresh) < (0.9 if num_rows == 2 else 0.4) * before


def test_what_cannot_be_told_or_judged_stays(draw):
    trained, merged = layer(), layer()
    # Differences of each token alone: what is fitted to some tells nothing of others.
    fresh = draw(50, told=0.0)
    before = missing(trained, merged, fresh)
    for name, values in attention_corrections(trained, merged, *draw(6, told=0.0)).items():
        merged.get_parameter(name).data = values
    assert missing(trained, merged, fresh) < 1.005 * before
    assert attention_corrections(trained, merged, *draw(1)) == {}
    same, apart = draw(10)
    assert attention_corrections(trained, merged, same, same) == {}
    # In a row that judges, and in one that is fitted.
    for row in (0, 1):
        holed = [values.clone() for values in apart]
        holed[row][0, 3, 5] = torch.nan
        assert attention_corrections(trained, merged, same, holed) == {}


class Exact(nn.Linear):
    """Computes in fp32, so that nothing but what is written is rounded."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight.float(), self.bias.float())


@pytest.mark.parametrize("mean", [1, 2, 4])
def test_what_the_written_numbers_lose_is_not_made_worse(mean):
    """The difference is below a step of bf16 in most of a weight, and inputs have a mean."""
    trained, merged = layer(), layer()
    for part in (trained, merged):
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(part.self_attn, name).__class__ = Exact
    generator = torch.Generator().manual_seed(0)
    mean_H = mean * nn.functional.normalize(torch.randn(H, generator=generator), dim=0) * H**0.5
    drift = 1e-3 * torch.randn(H, H, generator=generator) * H**-0.5

    def draw(num_rows):
        apart = [torch.randn(1, T, H, generator=generator) for _ in range(num_rows)]
        return [x + mean_H for x in apart], [x + mean_H + x @ drift for x in apart]

    fresh = draw(20)
    before = missing(trained, merged, fresh)
    for name, values in attention_corrections(trained, merged, *draw(40)).items():
        merged.get_parameter(name).data = values
    assert missing(trained, merged, fresh) <= before


def router():
    torch.manual_seed(1)
    found = GptOssTopKRouter(GptOssConfig(hidden_size=H, num_local_experts=E, num_experts_per_tok=K)).bfloat16()
    nn.init.normal_(found.weight, std=H**-0.5)
    return found


def flat(rows):
    return tuple([row[0] for row in part] for part in rows)


def routed(trained, merged, rows):
    """How far logits are apart, and the share of the trained router's choices that the merged one makes too."""
    (wanted, _, wanted_TK), (logits, _, chosen_TK) = (
        model(torch.cat(part)) for model, part in zip((trained, merged), rows, strict=True)
    )
    shared = [len({*a} & {*b}) / K for a, b in zip(wanted_TK.tolist(), chosen_TK.tolist(), strict=True)]
    return float((wanted.double() - logits.double()).norm()), sum(shared) / len(shared)


@torch.no_grad()
def test_a_router_chooses_what_the_trained_one_does(draw):
    trained, merged, fresh = router(), router(), flat(draw(50))
    before, agreed = routed(trained, merged, fresh)
    found = router_correction(trained, merged, *flat(draw(30)))
    assert found.keys() == {"weight", "bias"}
    for name, values in found.items():
        assert values.dtype == torch.bfloat16
        merged.get_parameter(name).data = values
    after, agree = routed(trained, merged, fresh)
    assert after < 0.5 * before
    assert 1 - agree < 0.6 * (1 - agreed)


@torch.no_grad()
def test_a_router_stays_where_logits_come_nearer_and_choices_do_not(draw):
    trained, merged, rows = router(), router(), flat(draw(30))[0]
    assert router_correction(trained, merged, rows, rows) == {}
    # What all experts have in common decides nothing, and takes up the digits of what does.
    trained = trained.float()
    trained.weight += 10 * torch.randn(H, generator=torch.Generator().manual_seed(2))
    wanted_rows = [row.float() for row in rows]
    _, agreed = routed(trained, merged, (wanted_rows, rows))
    assert agreed > 0.99
    assert router_correction(trained, merged, wanted_rows, rows) == {}
    # What one expert has beside decides enough to be worth them.
    trained.weight[0] += 1
    assert router_correction(trained, merged, wanted_rows, rows)


@pytest.mark.parametrize("num_inputs", [20, 100])
def test_the_ridge_is_the_one_of_the_normal_equations(num_inputs):
    generator = torch.Generator().manual_seed(1)

    def pair(rows):
        inputs = torch.randn(rows, H, generator=generator)
        return inputs, inputs[:, :O] + 0.1 * torch.randn(rows, O, generator=generator)

    fitted, held_out = pair(num_inputs), pair(50)
    inputs, outputs = (part.double() for part in fitted)
    wanted = {}
    for ridge in (3.0, 0.3, 0.03):
        gram = inputs.T @ inputs
        wanted[ridge] = torch.linalg.solve(gram + ridge * gram.trace() / H * torch.eye(H), inputs.T @ outputs).T
    best = min(wanted.values(), key=lambda weight: float((held_out[1] - held_out[0] @ weight.float().T).norm()))
    found = best_ridge(fitted, held_out, (3.0, 0.3, 0.03))
    torch.testing.assert_close(found, best.float(), rtol=1e-3, atol=1e-4)
    assert best_ridge(fitted, (held_out[0], -held_out[1]), (3.0,)) is None
