"""How Triton kernels are launched, and the small tables that tell their programs which rows are theirs.

T rows, sorted by expert · E experts · N tiles
"""

from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

# A step builds some tables in every layer and looks them up again in its backward pass, or builds those again that were
# dropped. Most have a few KB, but those of 131,072 tokens up to 400; of numbers alone, a layer of gpt-oss-120b has
# twelve, for as many chunks of its weights.
NUM_TABLES, NUM_TUPLES = 256, 1024


class RowTile(Protocol):
    """The constants of a program that takes up to T_ rows."""

    @property
    def T_(self) -> int: ...


AnyTile = TypeVar("AnyTile", bound=RowTile)


def launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Run `programs` of a kernel, the first of whose arguments is a tensor."""
    if not programs:
        return
    # Triton launches on the current device, which need not be that of a layer of a model spread over several.
    with torch.cuda.device_of(arguments[0]):
        kernel[(programs,)](*arguments, **constants)


def ceil_div(count: int, size: int) -> int:
    return -(-count // size)


def operand_dtype(rows: Tensor) -> Any:
    """What is multiplied: `rows` as they are, but fp32 in Triton's interpreter, which multiplies bf16's bits."""
    # torch for CPUs comes without triton, and refusals must be told there too.
    from triton import language as tl

    return tl.bfloat16 if rows.dtype == torch.bfloat16 and rows.device.type != "cpu" else tl.float32


def num_used(ends_E: Sequence[int]) -> int:
    """How many experts have rows."""
    return len(set(ends_E) - {0})


def tile_for(tiles: Sequence[AnyTile], ends_E: Sequence[int]) -> AnyTile:
    """The first that has room for the rows of an average expert among those that have any, or the last."""
    rows_per_expert = ceil_div(ends_E[-1], num_used(ends_E) or 1)
    return next((tile for tile in tiles if rows_per_expert <= tile.T_), tiles[-1])


def tile_table(
    ends_E: Sequence[int],
    T_: int,
    where: torch.device,
    experts: Collection[int] | None = None,
    *,
    kept: bool = True,
) -> Tensor:
    """(first row, number of rows, expert) for tiles of up to `T_` rows of one of `experts`: int32 `[N, 3]`.

    `kept` if the backward pass needs it too.
    """
    build = _tile_table if kept else _tile_table.__wrapped__
    return build(tuple(ends_E), T_, _frozen(experts), where, _stream(where))


def range_table(ends_E: Sequence[int], where: torch.device, experts: Collection[int] | None = None) -> Tensor:
    """(first row, row behind the last) of every expert, and no rows for those outside `experts`: int32 `[E, 2]`."""
    return _range_table(tuple(ends_E), _frozen(experts), where, _stream(where))


def on_device(numbers: Sequence[int], where: torch.device) -> Tensor:
    """A few numbers as int32 `[N]`: `ends_E` for `torch.nn.functional.grouped_mm`, or which experts a kernel takes."""
    return _on_device(tuple(numbers), where, _stream(where))


@lru_cache(NUM_TABLES)
def _tile_table(
    ends_E: tuple[int, ...], T_: int, experts: frozenset[int] | None, where: torch.device, stream: int
) -> Tensor:
    table = [
        (row, min(T_, end - row), expert)
        for expert, (start, end) in enumerate(_ranges(ends_E, experts))
        for row in range(start, end, T_)
    ]
    return _copied(torch.tensor(table, dtype=torch.int32, device="cpu").view(-1, 3), where)


@lru_cache(NUM_TABLES)
def _range_table(ends_E: tuple[int, ...], experts: frozenset[int] | None, where: torch.device, stream: int) -> Tensor:
    return _copied(torch.tensor(_ranges(ends_E, experts), dtype=torch.int32, device="cpu"), where)


@lru_cache(NUM_TUPLES)
def _on_device(numbers: tuple[int, ...], where: torch.device, stream: int) -> Tensor:
    return _copied(torch.tensor(numbers, dtype=torch.int32, device="cpu"), where)


def _ranges(ends_E: tuple[int, ...], experts: frozenset[int] | None) -> list[tuple[int, int]]:
    starts = (0, *ends_E[:-1])
    return [
        (start, end if experts is None or expert in experts else start)
        for expert, (start, end) in enumerate(zip(starts, ends_E, strict=True))
    ]


def _copied(table: Tensor, where: torch.device) -> Tensor:
    # From pageable memory the host would wait until the device has done all that it was given before.
    return table.pin_memory().to(where, non_blocking=True) if where.type == "cuda" else table


def _stream(where: torch.device) -> int:
    # A table is ready for what follows its copy on the same stream.
    return torch.cuda.current_stream(where).cuda_stream if where.type == "cuda" else 0


def _frozen(experts: Collection[int] | None) -> frozenset[int] | None:
    return None if experts is None else frozenset(experts)
