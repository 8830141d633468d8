"""What reads an export for comparison with the trained model: other programs' code, or ours.

A reader takes rows and gives fp32 logits at chosen positions. Weights stay as their file holds them, and each decoder
layer is widened to fp32 only while it runs: every bf16 or MXFP4 value is an fp32 value, so what remains between two
readers of one file is the order of their sums.

T tokens · H hidden · P chosen positions · V vocabulary
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import GptOssForCausalLM

from gptoss_ft.files import GB
from gptoss_ft.model.checkpoint import Checkpoint
from gptoss_ft.model.load import load_base
from gptoss_ft.model.spec import GptOssSpec

# Memory that a part takes while it is opened, by parameter: bf16, fp32, and what decoding MXFP4 needs beside them. Of
# gpt-oss-20b transformers took 6.6 and the reference implementation 6.6.
PART_BYTES = 7
# Memory of other programs' attention for each head, query and key: fp32, three times. 12.3 to 12.8 were seen.
SCORE_BYTES = 12.8

Rows = Sequence[tuple[Tensor, Tensor]]
"""`(input_ids_T, positions_P)` of each"""
Advance = Callable[[float], object]
"""Is told how many rows more have been read; a layer of one is a part of it."""
Reader = Callable[[Rows, Advance], Iterable[Tensor]]
"""Gives `logits_PV` of each row, in order."""


class NotRun(Exception):
    """A reader cannot open this here; the message says why and, if it can be mended, how."""


@dataclass(frozen=True, eq=False)
class LayerByLayer:
    """A reader that holds one part of its model at a time and takes all rows through it.

    Attributes:
        open_embedding: gives `input_ids_T -> hidden_TH`.
        open_layer: gives `hidden_TH -> hidden_TH` of the decoder layer of that number.
        open_head: gives `hidden_PH -> logits_PV`, the last norm included.
    """

    spec: GptOssSpec
    open_embedding: Callable[[], Callable[[Tensor], Tensor]]
    open_layer: Callable[[int], Callable[[Tensor], Tensor]]
    open_head: Callable[[], Callable[[Tensor], Tensor]]

    @torch.no_grad()
    def __call__(self, rows: Rows, advance: Advance) -> list[Tensor]:
        """Raises `NotRun` if memory does not suffice for the longest row."""
        require_layer_memory(self.spec, max(len(input_ids_T) for input_ids_T, _ in rows))
        num_layers = self.spec.num_hidden_layers
        part = self.open_embedding()
        hidden = [part(input_ids_T) for input_ids_T, _ in rows]
        for number in range(num_layers):
            # Else two layers would be in memory.
            del part
            part = self.open_layer(number)
            for row, hidden_TH in enumerate(hidden):
                hidden[row] = part(hidden_TH)
                advance(1 / num_layers)
        del part
        part = self.open_head()
        return [part(hidden_TH[positions_P]) for hidden_TH, (_, positions_P) in zip(hidden, rows, strict=True)]


def one_by_one(read: Callable[[Tensor, Tensor], Tensor]) -> Reader:
    """A reader of what takes one row, `(input_ids_T, positions_P) -> logits_PV`."""

    def read_rows(rows: Rows, advance: Advance) -> Iterator[Tensor]:
        for input_ids_T, positions_P in rows:
            yield read(input_ids_T, positions_P)
            advance(1)

    return read_rows


def open_with_gptoss_ft(folder: Path) -> Reader:
    """Our own `load_base`.

    Raises:
        NotRun: if the memory does not suffice.
    """
    return reader_of(load_for_reading(Checkpoint.open(folder)))


def load_for_reading(checkpoint: Checkpoint) -> GptOssForCausalLM:
    """The model as its files hold it, mapped; for `reader_of`.

    Raises:
        NotRun: if the memory does not suffice for a layer of dense experts.
    """
    dense = checkpoint.layout == "bf16"
    if dense:
        require_layer_memory(checkpoint.spec)
    return load_base(checkpoint.path, precision="bf16" if dense else "mxfp4")


def reader_of(model: GptOssForCausalLM | PeftModel) -> Reader:
    """A model that is loaded already, each of whose layers is widened to fp32 while it runs."""
    core = model.get_base_model() if isinstance(model, PeftModel) else model
    core.model.embed_tokens.register_forward_hook(lambda _module, _args, embedded: embedded.float())
    for module in (*core.model.layers, core.model.norm, core.lm_head):
        _widen_while_running(module)

    @torch.no_grad()
    def read(input_ids_T: Tensor, positions_P: Tensor) -> Tensor:
        return model(input_ids=input_ids_T[None], logits_to_keep=positions_P, use_cache=False).logits[0]

    return one_by_one(read)


def _widen_while_running(module: nn.Module) -> None:
    # What is narrow stays, so that what is mapped from a file stays mapped.
    narrow = [(parameter, parameter.data) for parameter in module.parameters() if parameter.dtype == torch.bfloat16]

    def widen(*_: object) -> None:
        for parameter, data in narrow:
            parameter.data = data.float()

    def restore(*_: object) -> None:
        for parameter, data in narrow:
            parameter.data = data

    module.register_forward_pre_hook(widen)
    module.register_forward_hook(restore)


def require_layer_memory(spec: GptOssSpec, num_tokens: int = 0) -> None:
    """Raise `NotRun` where no decoder layer, dense and widened, fits into memory, or not the head.

    Args:
        num_tokens: of the longest row, whose attention takes memory that is quadratic in them.
    """
    outer = spec.vocab_size * spec.hidden_size
    layer = (spec.num_parameters() - 2 * outer) // spec.num_hidden_layers
    attention = SCORE_BYTES * spec.num_attention_heads * num_tokens**2
    needed = int(max(PART_BYTES * max(layer, outer), 4 * layer + attention))
    available = psutil.virtual_memory().available
    if needed > available:
        raise NotRun(
            f"it needs {needed / GB:.1f} GB of memory and {available / GB:.1f} GB are free: "
            "verify on a machine with more"
        )
