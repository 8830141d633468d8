"""What to do instead of an export that keeps too little of the training."""

from gptoss_ft.config.values import Rounding

TRAINING = "train through the merge (adapter.qat=true), or adapter.targets=attention, which is not rounded to 4 bits"
PACKED = (
    "name the base's MXFP4 checkpoint with base=FOLDER: from that untrained experts keep their bits, and trained ones "
    "can be rounded by rounding=calibrated"
)
MERGED_TRAINING = "export format=mxfp4, original, gguf or bf16, which hold what was trained"

_CURES_OF_ROUNDING = {
    Rounding.nearest: ["try rounding=calibrated, or rounding=dithered for updates of several per cent", TRAINING],
    Rounding.dithered: ["try rounding=calibrated", TRAINING],
    Rounding.calibrated: ["raise calibration_tokens", TRAINING],
}


def cure(
    format: str,
    *,
    packed_base: bool,
    trains_experts: bool,
    rounding: Rounding = Rounding.nearest,
    merged_training: bool = False,
) -> str:
    """Which exports or trainings would keep more than this one.

    Args:
        format: a merged one, or `adapter_gguf`, which loses nothing unless its file is damaged.
        packed_base: the base has MXFP4 experts; merged formats round all experts of another.
        trains_experts: the adapter updates experts, else it leaves those of a packed base as they are.
        rounding: how experts were rounded.
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
        cures += _CURES_OF_ROUNDING[rounding] if packed_base else [PACKED]
    return ", or ".join(cures)
