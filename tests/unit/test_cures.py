"""What a refused export is told: only what this base, adapter and rounding can still do."""

import re

import pytest

from gptoss_ft.config.values import Rounding
from gptoss_ft.export.cures import Limits, cure

MERGED = ("bf16", "mxfp4", "original", "gguf", "gguf_q8_0")
WAYS = ("rounding=calibrated", "rounding=dithered", "calibration_tokens", "adapter.qat=true", "adapter.targets")


def named(text):
    return {way for way in (*WAYS, "format=bf16", "base=FOLDER") if way in text}


@pytest.mark.parametrize("format", MERGED)
def test_no_format_is_its_own_cure(format):
    for packed_base in (False, True):
        text = cure(format, packed_base=packed_base, trains_experts=True)
        assert not re.search(rf"format={format}\b", text)
        assert ("format=adapter_gguf" if "gguf" in format else "format=adapter)") in text


@pytest.mark.parametrize("format", ["mxfp4", "original", "gguf", "gguf_q8_0"])
def test_roundings_that_start_from_packed_experts_are_for_packed_bases(format):
    packed = cure(format, packed_base=True, trains_experts=True)
    assert {"rounding=calibrated", "rounding=dithered", "adapter.qat=true", "adapter.targets"} <= named(packed)
    dense = cure(format, packed_base=False, trains_experts=True)
    assert named(dense) - {"format=bf16"} == {"base=FOLDER", "rounding=calibrated"}
    assert dense.index("base=FOLDER") < dense.index("rounding=calibrated")


def test_what_was_tried_is_not_named_again():
    calibrated, dithered = (
        cure("mxfp4", packed_base=True, trains_experts=True, rounding=rounding)
        for rounding in (Rounding.calibrated, Rounding.dithered)
    )
    assert "rounding=" not in calibrated and "calibration_tokens" in calibrated
    assert "rounding=calibrated" in dithered and "rounding=dithered" not in dithered


@pytest.mark.parametrize(
    ("limits", "wanted", "others"),
    [
        (None, "raise calibration_tokens", "layers="),
        (Limits(), "raise calibration_tokens", "layers="),
        (Limits(restricted=True), "leave layers= and experts= out", "calibration_tokens"),
        (Limits(restricted=True, all_rows=True), "leave layers= and experts= out", "calibration_tokens"),
        (Limits(all_rows=True), "adapter.qat=true", "calibration_tokens"),
    ],
)
def test_calibration_is_not_to_be_raised_where_that_changes_nothing(limits, wanted, others):
    text = cure("mxfp4", packed_base=True, trains_experts=True, rounding=Rounding.calibrated, limits=limits)
    assert wanted in text and others not in text


def test_experts_that_keep_their_bits_have_no_cure():
    assert not named(cure("mxfp4", packed_base=True, trains_experts=False))
    assert not named(cure("bf16", packed_base=False, trains_experts=True))


def test_a_merge_aware_run_is_not_served_as_an_adapter():
    text = cure("gguf_q8_0", packed_base=True, trains_experts=True, merged_training=True)
    assert "format=mxfp4" in text and "adapter" not in text
