"""Random gpt-oss checkpoints in the published form, written as a stream.

Every tensor, and every expert of a stack, has its own random stream keyed by the seed and its HF name, so the
three layouts of one seed hold the same model and sharding changes nothing.

Expert weights are drawn in MXFP4 directly, since 19 billion Gaussians would take longer than writing the file: each
block's scale comes from the distribution that the "even" rule gives for 32 Gaussian weights, and its codes from
that of a Gaussian rounded at this scale, truncated where the block's maximum must lie. Elements are therefore
distributed as those of a quantised Gaussian, with probabilities in steps of 1/256.
"""

import hashlib
import math
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gptoss_ft.errors import ConfigError
from gptoss_ft.files import whole_folder
from gptoss_ft.kernels.codec import SIGN_BIT
from gptoss_ft.kernels.reference import BLOCK_SIZE, MAGNITUDES, SCALE_BIAS, dequantize_mxfp4
from gptoss_ft.model import layouts
from gptoss_ft.model.shards import Entry, Producer, write_shards
from gptoss_ft.model.spec import SPECS, GptOssSpec, Layout, TensorSpec
from gptoss_ft.model.tokenizer import write_tokenizer_files

EMBEDDING_STD = 1.0
# Logits of std 3.4: a frozen head much smaller than this caps them and leaves adapters little to learn with.
HEAD_GAIN = 3.4
BIAS_STD = 0.02
NORM_STD = 0.1
SINK_STD = 1.0
PIECE_ELEMENTS = 1 << 22


def init_checkpoint(
    shape: str | GptOssSpec, out: Path, *, seed: int = 0, layout: Layout = "mxfp4", progress: bool = True
) -> Path:
    """Write a random checkpoint of `shape`, a name in `SPECS` or a spec, to the new folder `out`.

    HF layouts come with config, generation config and, for the real vocabulary, tokenizer files; the original
    layout consists of its config and weights.

    Raises:
        ConfigError: if the shape is unknown.
        UserError: if `out` exists or its disk is too small.
    """
    if isinstance(shape, str):
        if shape not in SPECS:
            raise ConfigError(f"model={shape} is not one of {', '.join(SPECS)}")
        shape = SPECS[shape]
    with whole_folder(out, num_bytes=shape.num_bytes(layout)) as folder:
        (folder / "config.json").write_text(shape.config_text(layout), encoding="utf-8")
        write_shards(folder, random_tensors(shape, seed, layout), progress=progress)
        if layout != "original" and shape.vocab_size == SPECS["gpt_oss_20b"].vocab_size:
            write_tokenizer_files(folder)
    return Path(out)


def random_tensors(spec: GptOssSpec, seed: int, layout: Layout) -> Iterator[Entry]:
    """Every tensor of a random model in `layout`, ready for `write_shards`."""
    packed = spec.tensors("mxfp4")
    for name, tensor in spec.tensors(layout).items():
        if layout == "original":
            parts = [_producer(hf_name, packed[hf_name], seed) for hf_name in layouts.to_hf(name)]
            yield name, tensor, partial(_chain, parts)
        elif name in packed:
            yield name, tensor, _producer(name, tensor, seed)
        else:
            yield name, tensor, partial(_dequantized_experts, name, tensor, seed)


def _chain(producers: list[Producer]) -> Iterator[Tensor]:
    for produce in producers:
        yield from produce()  # type: ignore[misc]


def _producer(name: str, tensor: TensorSpec, seed: int) -> Producer:
    stem, _, kind = name.rpartition("_")
    if kind in ("blocks", "scales"):
        return partial(_packed_experts, stem, tensor, seed, 0 if kind == "blocks" else 1)
    return partial(_gaussian, name, tensor, seed)


def _stream(seed: int, key: str) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return np.random.Generator(np.random.SFC64(int.from_bytes(digest, "little")))


def _gaussian(name: str, tensor: TensorSpec, seed: int) -> Iterator[Tensor]:
    mean, std = _moments(name, tensor)
    stream, remaining = _stream(seed, name), math.prod(tensor.shape)
    while remaining:
        count = min(remaining, PIECE_ELEMENTS)
        values = torch.from_numpy(stream.standard_normal(count, dtype=np.float32))
        yield values.mul_(std).add_(mean).to(tensor.dtype)
        remaining -= count


def _moments(name: str, tensor: TensorSpec) -> tuple[float, float]:
    if "norm" in name:
        return 1.0, NORM_STD
    if name.endswith("sinks"):
        return 0.0, SINK_STD
    if name.endswith("bias"):
        return 0.0, BIAS_STD
    if "embed_tokens" in name:
        return 0.0, EMBEDDING_STD
    return 0.0, (HEAD_GAIN if "lm_head" in name else 1.0) * tensor.shape[-1] ** -0.5


def _packed_experts(stem: str, tensor: TensorSpec, seed: int, part: int) -> Iterator[Tensor]:
    experts, rows, groups = tensor.shape[:3]
    for expert in range(experts):
        yield random_expert(f"{stem}.{expert}", rows, groups, seed, scales_only=part == 1)[part]


def _dequantized_experts(stem: str, tensor: TensorSpec, seed: int) -> Iterator[Tensor]:
    experts, columns, rows = tensor.shape
    for expert in range(experts):
        blocks, scales = random_expert(f"{stem}.{expert}", rows, columns // BLOCK_SIZE, seed)
        yield dequantize_mxfp4(blocks, scales, tensor.dtype).T.contiguous()


def random_expert(key: str, rows: int, groups: int, seed: int, *, scales_only: bool = False) -> tuple[Tensor, Tensor]:
    """One expert's random blocks [O, G, 16] and scales [O, G], of weights scaled by their fan-in.

    A pure function of seed and key. With `scales_only` the blocks are left empty.
    """
    std = (groups * BLOCK_SIZE) ** -0.5
    exponents, upper_bounds, thresholds = _block_classes(std)
    classes = np.searchsorted(thresholds, _random_uint16(_stream(seed, key + ".scales"), rows * groups), side="right")
    scales = (np.array(exponents) + SCALE_BIAS).astype(np.uint8)[classes].reshape(rows, groups)
    if scales_only:
        return torch.empty(0, dtype=torch.uint8), torch.from_numpy(scales)
    tables = torch.cat(
        [_byte_table(bound / std, 2.0**exponent / std) for exponent, bound in zip(exponents, upper_bounds, strict=True)]
    )
    draws = torch.from_numpy(_random_uint16(_stream(seed, key + ".blocks"), rows * groups * 16).view(np.int16))
    index = draws.view(-1, 16).int().bitwise_and_(0xFFFF)
    index += torch.from_numpy(classes.astype(np.int32) << 16).unsqueeze(-1)
    blocks = tables.index_select(0, index.flatten())
    return blocks.view(rows, groups, 16), torch.from_numpy(scales)


def _random_uint16(stream: np.random.Generator, count: int) -> np.ndarray:
    return stream.bit_generator.random_raw(-(-count // 4)).view(np.uint16)[:count]


def _block_classes(std: float) -> tuple[list[int], list[float], np.ndarray]:
    """The scale exponents an "even" block of Gaussians can have, their upper bounds on amax, and cumulative odds.

    The bounds are 1.75 powers of two. Odds are in units of 1/65536; exponents less likely than that are left out.
    """
    exponents: list[int] = []
    bounds: list[float] = []
    cumulative: list[int] = []
    for exponent in range(math.floor(math.log2(std)) - 6, math.floor(math.log2(std)) + 4):
        bound = 1.75 * 2.0 ** (exponent + 2)
        below = math.erf(bound / std / math.sqrt(2)) ** BLOCK_SIZE
        odds = round(65536 * below)
        if odds > (cumulative[-1] if cumulative else 0):
            exponents.append(exponent)
            bounds.append(bound)
            cumulative.append(odds)
    return exponents, bounds, np.array(cumulative[:-1], dtype=np.int64)


def _byte_table(upper_bound: float, unit: float) -> Tensor:
    """Bytes of two independent codes for each of 65536 equally likely draws.

    A code is a standard Gaussian below `upper_bound` in magnitude, rounded in steps of `unit`.
    """
    edges = [0.0] + [(a + b) / 2 * unit for a, b in pairwise(MAGNITUDES)] + [math.inf]
    odds = [math.erf(min(edge, upper_bound) / math.sqrt(2)) / math.erf(upper_bound / math.sqrt(2)) for edge in edges]
    magnitudes = np.repeat(np.arange(len(MAGNITUDES)), np.diff([round(128 * odd) for odd in odds]))
    codes = np.concatenate((magnitudes, magnitudes | SIGN_BIT)).astype(np.uint8)
    return torch.from_numpy((codes[None, :] | codes[:, None] << 4).flatten())
