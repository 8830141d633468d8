from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import pytest
import torch

from gptoss_ft.adapters.attach import Targets, attach_adapters
from gptoss_ft.adapters.save import save_adapter
from gptoss_ft.export.adapter import read_adapter
from gptoss_ft.export.deltas import LowRankDelta
from gptoss_ft.harmony.vocabulary import ranks_file_bytes
from gptoss_ft.model.checkpoint import Checkpoint
from gptoss_ft.model.init import init_checkpoint
from gptoss_ft.model.load import load_base
from gptoss_ft.model.spec import SPECS, GptOssSpec

SMALL = replace(SPECS["tiny"], vocab_size=300, sliding_window=8, eos_token_id=1, pad_token_id=0)
# Hidden and intermediate size differ, the larger one either way; layers, experts, experts of a token and ranks vary.
PEER_SHAPES: dict[str, tuple[GptOssSpec, int]] = {
    "2 layers, 4 experts, rank 3": (
        replace(
            SMALL,
            num_hidden_layers=2,
            hidden_size=64,
            intermediate_size=96,
            num_local_experts=4,
            num_experts_per_tok=2,
        ),
        3,
    ),
    "3 layers, 6 experts, rank 8": (
        replace(SMALL, num_hidden_layers=3, hidden_size=128, intermediate_size=32, num_local_experts=6),
        8,
    ),
    "4 layers, 5 experts, rank 1": (
        replace(
            SMALL,
            num_hidden_layers=4,
            hidden_size=96,
            intermediate_size=160,
            num_local_experts=5,
            num_experts_per_tok=3,
            num_key_value_heads=1,
        ),
        1,
    ),
}


@dataclass(frozen=True)
class Peer:
    """A random base in every layout, and a random adapter of it."""

    spec: GptOssSpec
    rank: int
    bases: dict[str, Path]
    adapter: Path

    @property
    def base(self) -> Checkpoint:
        return Checkpoint.open(self.bases["mxfp4"])

    @property
    def deltas(self) -> dict[str, LowRankDelta]:
        return read_adapter(self.adapter, self.spec)

    def ids(self, num_tokens: int) -> torch.Tensor:
        return torch.randint(2, self.spec.vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(0))


def make_random_adapter(base: Path, out: Path, *, targets=("all",), r=4, **options) -> Path:
    """An adapter whose B is random, so that it has an effect."""
    spec = Checkpoint.open(base).spec
    chosen = Targets.parse(
        list(targets),
        num_layers=spec.num_hidden_layers,
        num_experts=spec.num_local_experts,
        layers=options.pop("layers", None),
        experts=options.pop("experts", None),
    )
    model, _ = attach_adapters(load_base(base), chosen, r=r, alpha=2 * r, **options)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return save_adapter(model, out)


def in_fp32(file, out):
    """The same file with every number as fp32."""
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(out, "gpt-oss")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.fixture(scope="session")
def widened():
    return in_fp32


@pytest.fixture(scope="session")
def random_adapter():
    return make_random_adapter


@pytest.fixture(scope="session", params=PEER_SHAPES)
def peer(request, tmp_path_factory) -> Peer:
    """Each of the shapes that exports are opened in by other programs."""
    spec, rank = PEER_SHAPES[request.param]
    root = tmp_path_factory.mktemp("peer")
    bases = {
        layout: init_checkpoint(spec, root / layout, seed=1, layout=layout, progress=False)
        for layout in ("mxfp4", "bf16", "original")
    }
    return Peer(spec, rank, bases, make_random_adapter(bases["mxfp4"], root / "adapter", r=rank))


@pytest.fixture(scope="session")
def openai_encoding(tmp_path_factory):
    """openai-harmony's own encoding, reading our ranks file; it checks the file's hash itself."""
    openai_harmony = pytest.importorskip("openai_harmony")
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "o200k_base.tiktoken").write_bytes(ranks_file_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_ENCODINGS_BASE", str(folder))
        yield openai_harmony.load_harmony_encoding("HarmonyGptOss")
