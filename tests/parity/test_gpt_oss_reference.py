"""Our way into OpenAI's reference implementation, against its own way with the original layout."""

import pytest
import torch

from gptoss_ft.errors import UserError
from gptoss_ft.export.gpt_oss_reader import _Experts, open_with_gpt_oss
from gptoss_ft.export.readers import reader_of
from gptoss_ft.model.init import init_checkpoint
from gptoss_ft.model.load import load_base
from gptoss_ft.model.spec import GptOssSpec

reference = pytest.importorskip("gpt_oss.torch.model")

SPEC = GptOssSpec(
    num_hidden_layers=2,
    num_local_experts=4,
    num_experts_per_tok=2,
    hidden_size=64,
    intermediate_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=300,
    eos_token_id=1,
    pad_token_id=0,
)
IDS = torch.randint(2, 300, (160,), generator=torch.Generator().manual_seed(0))
ALL = torch.arange(160)


def logits(reader, positions=ALL):
    (found,) = reader([(IDS, positions)], lambda share: None)
    return found


@pytest.fixture(scope="module")
def own_logits(tmp_path_factory):
    """What the reference implementation computes from the original layout of the same seed, loaded by itself."""
    folder = tmp_path_factory.mktemp("original") / "base"
    init_checkpoint(SPEC, folder, layout="original", progress=False)
    with torch.no_grad():
        return reference.Transformer.from_checkpoint(str(folder), device="cpu").float()(IDS)


@pytest.mark.parametrize("layout", ["mxfp4", "bf16"])
def test_hf_layouts_read_as_the_original(own_logits, tmp_path, layout):
    init_checkpoint(SPEC, tmp_path / "base", layout=layout, progress=False)
    torch.testing.assert_close(logits(open_with_gpt_oss(tmp_path / "base")), own_logits, rtol=0, atol=2e-5)


def test_chosen_positions_are_rows_of_all(own_logits, tmp_path):
    init_checkpoint(SPEC, tmp_path / "base", progress=False)
    chosen = torch.tensor([3, 150])
    found = logits(open_with_gpt_oss(tmp_path / "base"), chosen)
    torch.testing.assert_close(found, own_logits[chosen], rtol=0, atol=2e-5)


def test_another_way_to_compute_experts_is_refused_with_the_version_to_install():
    experts = _Experts(torch.zeros(4, 6, 8), torch.zeros(3, 2, dtype=torch.long))
    assert torch.einsum("beck,bk->bec", experts, torch.zeros(3, 8)).shape == (3, 2, 6)
    with pytest.raises(UserError, match=r"other means than 0\.0\.9: pip install .* gpt-oss==0\.0\.9"):
        torch.einsum("beck,kb->bec", experts, torch.zeros(8, 3))


def test_widening_layer_by_layer_equals_a_model_in_fp32(tmp_path):
    """bf16 weights widened while a layer runs give the logits of a model that is fp32 throughout."""
    init_checkpoint(SPEC, tmp_path / "base", layout="bf16", progress=False)
    widened, wide = (
        reader_of(load_base(tmp_path / "base", precision="bf16", dtype=dtype))
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert logits(widened).equal(logits(wide))
    assert logits(widened).dtype == torch.float32
