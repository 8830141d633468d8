"""GGUF exports in llama.cpp itself: logits, adapters beside the base, and tokens.

Where a number is to be exact, a file's weights are widened to fp32 first: llama.cpp then computes in fp32 too, while
it rounds activations to bf16 or 8 bits where they meet bf16 or MXFP4 weights. It also rounds the two dimensions
between which YaRN blends to whole ones, which gpt-oss does not: the reference here does so too, but where it says.
"""

import re
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoModelForCausalLM

from gptoss_ft.adapters.attach import Targets, attach_adapters
from gptoss_ft.adapters.save import save_adapter
from gptoss_ft.export.adapter import read_adapter
from gptoss_ft.export.distance import Distances, quantile
from gptoss_ft.export.gguf_adapter import export_adapter_gguf
from gptoss_ft.export.llama_cpp import LlamaCpp, open_adapter_with_llama_cpp
from gptoss_ft.export.merge import merge
from gptoss_ft.harmony import vocabulary
from gptoss_ft.model.checkpoint import Checkpoint
from gptoss_ft.model.init import init_checkpoint
from gptoss_ft.model.load import load_base
from gptoss_ft.model.spec import SPECS

pytestmark = pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")


def logits(folder, ids_T, *, deltas=None, truncate=True):
    """transformers' `[T, V]` in fp32, with updates added to its weights in place."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.config.rope_parameters["truncate"] = truncate
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    with torch.no_grad():
        for name, delta in (deltas or {}).items():
            update = delta.scaling * (delta.B.float() @ delta.A.float())
            # Of expert stacks transformers holds the transpose.
            model.get_parameter(name).add_(update.mT if update.dim() == 3 else update)
        return model(ids_T[None]).logits[0]


def distance(wanted, found, q=0.95):
    return quantile(Distances.between(wanted, found).relative, q)


def some_ids(spec, num_tokens):
    return torch.randint(0, spec.vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def base(small_bases):
    return Checkpoint.open(small_bases["mxfp4"])


@pytest.fixture(scope="module")
def files(base, widened, tmp_path_factory):
    """The base in both GGUF formats, and widened to fp32."""
    root = tmp_path_factory.mktemp("gguf")
    for format in ("gguf", "gguf_q8_0"):
        merge(base, {}, root / format, format=format, progress=False)
    exact = widened(root / "gguf" / "model.gguf", root / "exact.gguf")
    return {format: root / format / "model.gguf" for format in ("gguf", "gguf_q8_0")} | {"exact": exact}


# 600 tokens are many of the sliding window's 8; 1e-6 and 4e-6 were measured.
@pytest.mark.parametrize("num_tokens", [40, 600])
def test_llama_cpp_computes_what_transformers_does(base, files, num_tokens):
    ids = some_ids(base.spec, num_tokens)
    found = LlamaCpp(files["exact"])(ids, torch.arange(num_tokens))
    assert distance(logits(base.path, ids), found) < 2e-5


# Measured: 0.8 % with bf16 matrices and 1.9 % with 8-bit ones.
@pytest.mark.parametrize("format", ["gguf", "gguf_q8_0"])
def test_its_own_arithmetic_moves_logits_by_little(base, files, format):
    ids = some_ids(base.spec, 40)
    found = LlamaCpp(files[format])(ids, torch.arange(40))
    assert 1e-3 < distance(logits(base.path, ids), found, 0.5) < 0.03


def test_its_rounding_of_yarn_is_the_only_other_difference(base, files):
    ids = some_ids(base.spec, 600)
    found = LlamaCpp(files["exact"])(ids, torch.arange(600))
    assert 1e-3 < distance(logits(base.path, ids, truncate=False), found) < 0.02


def test_positions_are_chosen_in_any_number(base, files):
    ids, reader = some_ids(base.spec, 40), LlamaCpp(files["exact"])
    assert torch.equal(reader(ids, torch.arange(40))[[3, 39]], reader(ids, torch.tensor([3, 39])))


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "rslora"])
def adapter(request, base, tmp_path_factory):
    """A random adapter of everything that can have one."""
    spec = base.spec
    targets = Targets.parse(["all", "router"], num_layers=spec.num_hidden_layers, num_experts=spec.num_local_experts)
    model, _ = attach_adapters(load_base(base.path), targets, r=3, alpha=5, use_rslora=request.param)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return save_adapter(model, tmp_path_factory.mktemp("adapter") / "adapter")


def test_base_and_adapter_together_are_the_merged_model(base, files, adapter, tmp_path):
    ids = some_ids(base.spec, 40)
    deltas = read_adapter(adapter, base.spec)
    file = export_adapter_gguf(adapter, tmp_path / "out", base, progress=False) / "adapter.gguf"
    merged = logits(base.path, ids, deltas=deltas)
    assert distance(merged, LlamaCpp(files["exact"], file)(ids, torch.arange(40))) < 2e-5
    assert distance(merged, LlamaCpp(files["exact"])(ids, torch.arange(40)), 0.5) > 0.1


def test_the_base_beside_an_adapter_is_written_and_removed_again(base, adapter, tmp_path):
    ids = some_ids(base.spec, 40)
    file = export_adapter_gguf(adapter, tmp_path / "out", base, progress=False) / "adapter.gguf"
    reader = open_adapter_with_llama_cpp(base.path, file)
    merged = logits(base.path, ids, deltas=read_adapter(adapter, base.spec))
    assert distance(merged, reader(ids, torch.arange(40)), 0.5) < 0.03
    del reader
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


TEXTS = [
    "Hello world, it's 12345 o'clock.\n\n  Tabs\tand   spaces \r\n",
    "if (x < 0) {\n\t\treturn -1; // 注释\n}\n",
    "中文字符，测试一下。日本語のテキスト 한국어 텍스트입니다",
    "مرحبا بالعالم ελληνικά Ωμέγα İstanbul ẞ ǅ Ⅷ ½ ٣٤٥",
    "naïve café 👩\u200d👩\u200d👧 “quotes” … 3.14e-10 HTTPServer I'LL you'Re",
    "<|start|>system<|message|>Reasoning: low<|end|><|start|>user<|message|>2 + 2?<|end|><|start|>assistant<|channel|>"
    "analysis<|message|>Easy.<|end|><|start|>assistant<|channel|>commentary to=functions.add <|constrain|>json"
    '<|message|>{"a": 2}<|call|>',
]


@pytest.fixture(scope="module")
def tokenize(tmp_path_factory):
    """llama.cpp's tokenizer, from the head of a file with the real vocabulary."""
    import llama_cpp

    root = tmp_path_factory.mktemp("vocabulary")
    spec = replace(SPECS["tiny"], hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    base = Checkpoint.open(init_checkpoint(spec, root / "base", progress=False))
    merge(base, {}, root / "out", format="gguf", progress=False)
    options = llama_cpp.llama_model_default_params()
    options.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(root / "out" / "model.gguf").encode(), options)

    def run(text):
        data = text.encode()
        ids = (llama_cpp.llama_token * len(data))()
        # With whatever it would add at the start, and control tokens taken as such.
        vocab = llama_cpp.llama_model_get_vocab(model)
        return list(ids[: llama_cpp.llama_tokenize(vocab, data, len(data), ids, len(data), True, True)])

    yield run
    llama_cpp.llama_model_free(model)


@pytest.mark.slow
def test_texts_become_the_tokens_that_were_trained_on(tokenize, tmp_path):
    for text in TEXTS:
        assert tokenize(text) == with_control_tokens(text), text


# Its name for o200k's pieces leaves out combining marks, which split there: Hindi, Thai and others have more tokens.
@pytest.mark.slow
@pytest.mark.xfail(strict=True, reason="llama.cpp's gpt-4o pre-tokenizer takes combining marks for no letters")
@pytest.mark.parametrize("text", ["नमस्ते दुनिया", "สวัสดีชาวโลก"])
def test_scripts_with_combining_marks(tokenize, text):
    assert tokenize(text) == vocabulary.encode(text)


def with_control_tokens(text):
    """Our token ids of a rendered conversation."""
    ids = []
    for piece in re.split(r"(<\|[a-z]+\|>)", text):
        special = vocabulary.SPECIAL_TOKENS.get(piece)
        ids += [special] if special is not None else vocabulary.encode(piece)
    return ids
