"""Settings shared by every test."""

import os
from dataclasses import replace

import pytest

# Nothing here may reach a network; a hub that is asked by mistake should fail at once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
# The tests' tensors are tiny: several threads make them slower, and many times slower on a machine with other work.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from gptoss_ft.data import cache
from gptoss_ft.model.init import init_checkpoint
from gptoss_ft.model.spec import SPECS


@pytest.fixture(scope="session", autouse=True)
def sample_cache(tmp_path_factory):
    """Compiled samples are kept where the tests end, and not in the user's own cache."""
    folder = tmp_path_factory.mktemp("cache") / "samples"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "default_folder", lambda: folder)
        yield folder


@pytest.fixture(scope="session")
def small_spec():
    """A gpt-oss small enough for a test, with hidden != intermediate and both kinds of layer."""
    return replace(
        SPECS["tiny"],
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        vocab_size=512,
        sliding_window=8,
        eos_token_id=500,
        pad_token_id=0,
    )


@pytest.fixture(scope="session")
def small_bases(small_spec, tmp_path_factory):
    """The same random model in each published layout."""
    root = tmp_path_factory.mktemp("bases")
    return {
        layout: init_checkpoint(small_spec, root / layout, seed=1, layout=layout, progress=False)
        for layout in ("mxfp4", "bf16", "original")
    }
