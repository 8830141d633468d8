"""Whether the weights that a merge rewrites are numbers; those that it copies are none of its business."""

from collections.abc import Iterator, Mapping

from gptoss_ft.errors import UserError
from gptoss_ft.export.deltas import LowRankDelta
from gptoss_ft.kernels.reference import SCALE_NAN
from gptoss_ft.model.checkpoint import Checkpoint

CHUNK_ROWS = 4096


def check_rewritten(base: Checkpoint, deltas: Mapping[str, LowRankDelta], format: str) -> None:
    """Raise UserError, naming tensor and expert, if a weight that `format` writes anew holds NaN or infinity.

    Reads those weights once; of packed experts the scales, which alone can say NaN.
    """
    for name, tensor in base.spec.tensors("bf16").items():
        is_stack = len(tensor.shape) == 3
        delta = deltas.get(name)
        rounded = base.layout == "bf16" and format != "bf16" if is_stack else format == "gguf_q8_0"
        if is_stack:
            experts = range(tensor.shape[0])
            chosen = [e for e in experts if rounded or (delta is not None and delta.factors(e) is not None)]
            holed = next((f", expert {e}" for e in chosen if not _is_finite(base, name, e, e + 1)), None)
        elif rounded or (delta is not None and delta.factors() is not None):
            bad = (rows for rows in _chunks(tensor.shape[0]) if not _is_finite(base, name, *rows))
            holed = next((f", rows {start} to {stop - 1}" for start, stop in bad), None)
        else:
            continue
        if holed is not None:
            raise UserError(
                f"{base.path} holds NaN or infinite numbers in {name}{holed}: it is damaged, copy or download it again"
            )


def _is_finite(base: Checkpoint, name: str, start: int, stop: int) -> bool:
    if f"{name}_scales" in base.tensor_specs():
        return not bool((base.read(f"{name}_scales", start, stop) == SCALE_NAN).any())
    return bool(base.read(name, start, stop).isfinite().all())


def _chunks(num_rows: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + CHUNK_ROWS, num_rows)) for start in range(0, num_rows, CHUNK_ROWS))
