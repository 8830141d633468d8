"""What to do instead of an export that keeps too little of the training."""

from dataclasses import dataclass

from gptoss_ft.config.values import Rounding

TRAINING = "train through the merge (adapter.qat=true), or adapter.targets=attention, which is not rounded to 4 bits"
PACKED = (
    "if the base was made from an MXFP4 checkpoint, name that one with base=FOLDER: from that untrained experts keep "
    "their bits, and trained ones can be rounded by rounding=calibrated"
)
MERGED_TRAINING = "export format=mxfp4, original, gguf or bf16, which hold what was trained"


@dataclass(frozen=True)
class Limits:
    """What kept calibrated rounding from more, beside its number of tokens.

    Attributes:
        restricted: it was for some layers or experts only.
        all_rows: it had all of the run's training rows.
    """

    restricted: bool = False
    all_rows: bool = False


def cure(
    format: str,
    *,
    packed_base: bool,
    trains_experts: bool,
    rounding: Rounding = Rounding.nearest,
    limits: Limits | None = None,
    merged_training: bool = False,
) -> str:
    """Which exports or trainings would keep more than this one.

    Args:
        format: a merged one, or `adapter_gguf`, which loses nothing unless its file is damaged.
        packed_base: the base has MXFP4 experts; merged formats round all experts of another.
        trains_experts: the adapter updates experts, else it leaves those of a packed base as they are.
        rounding: how experts were rounded.
        limits: of calibrated rounding; None where they are not known.
        merged_training: the adapter was trained through the rounding of its merge.
    """
    if format == "adapter_gguf":
        return "export again"
    if merged_training:
        return MERGED_TRAINING
    is_gguf = format.startswith("gguf")
    cures = ["export format=gguf"] if format == "gguf_q8_0" else []
    adapter = "adapter_gguf" if is_gguf else "adapter"
    cures.append(f"serve the adapter beside the base (format={adapter}), which loses nothing")
    if format != "bf16" and (trains_experts or not packed_base):
        if not is_gguf:
            cures.append("export format=bf16")
        cures += [*_other_roundings(rounding, limits or Limits()), TRAINING] if packed_base else [PACKED]
    return ", or ".join(cures)


def _other_roundings(rounding: Rounding, limits: Limits) -> list[str]:
    match rounding:
        case Rounding.nearest:
            return ["try rounding=calibrated, or rounding=dithered for updates of several per cent"]
        case Rounding.dithered:
            return ["try rounding=calibrated"]
    if limits.restricted:
        return ["leave layers= and experts= out"]
    return [] if limits.all_rows else ["raise calibration_tokens"]
