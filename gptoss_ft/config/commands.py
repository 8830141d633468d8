"""Every key of the commands beside `gptoss-ft train`, as `schema` has those of training."""

import re
from dataclasses import dataclass
from math import inf

from gptoss_ft.config.schema import RowsConfig
from gptoss_ft.config.values import (
    FIDELITY_TOKENS_MEANING,
    MIN_FIDELITY,
    MIN_FIDELITY_MEANING,
    ROUNDING_MEANING,
    TOKENS_MEANING,
    ExportFormat,
    Layout,
    Rounding,
    Shape,
    check_fidelity,
    check_rounding,
    key,
    require,
    require_seed,
)


@dataclass(frozen=True, kw_only=True)
class InitCommand:
    """`gptoss-ft init`"""

    model: Shape = key("shape to write")
    out: str = key("folder to create")
    seed: int = key("seed of the weights", default=0)
    layout: Layout = key("the published MXFP4 layout, bf16 or OpenAI's original", default=Layout.mxfp4)

    def __post_init__(self) -> None:
        require_seed(self.seed)


@dataclass(frozen=True, kw_only=True)
class ExportCommand:
    """`gptoss-ft export`"""

    run: str = key("run folder that `gptoss-ft train` made", reads="folder")
    format: ExportFormat = key("what to write")
    out: str = key("folder to create")
    base: str | None = key("base checkpoint, if it has moved since training", reads="folder", default=None)
    rounding: Rounding = key(ROUNDING_MEANING, default=Rounding.nearest)
    calibration_tokens: int = key(TOKENS_MEANING, default=4096)
    layers: list[int] | None = key("layers that rounding=calibrated is for, from 0; null is every layer", default=None)
    experts: list[int] | None = key(
        "experts it is for in those layers, beside their attention and router; null is every one", default=None
    )
    min_fidelity: float = key(MIN_FIDELITY_MEANING, default=MIN_FIDELITY)
    fidelity_tokens: int = key(FIDELITY_TOKENS_MEANING, default=1024)
    data: str | None = key("JSONL file to measure on; null takes the run's held-out rows", reads="file", default=None)
    merged_base: bool = key("merge even into a base that this run was merged into already", default=False)

    def __post_init__(self) -> None:
        check_rounding(self.rounding, self.calibration_tokens, [self.format])
        check_fidelity(self.min_fidelity, self.fidelity_tokens)
        for name in ("layers", "experts"):
            numbers = getattr(self, name)
            if numbers is not None:
                require(all(number >= 0 for number in numbers), name, "numbers from 0", numbers)
                require(self.rounding is Rounding.calibrated, name, "null unless rounding=calibrated", numbers)


@dataclass(frozen=True, kw_only=True)
class VerifyCommand:
    """`gptoss-ft verify`"""

    run: str = key("run folder that `gptoss-ft train` made", reads="folder")
    path: str = key("export to compare with the trained model", reads="folder")
    data: str | None = key("JSONL file to compare on; null takes the run's held-out rows", reads="file", default=None)
    base: str | None = key("base checkpoint, if it has moved since training", reads="folder", default=None)
    max_tokens: int = key("tokens to compare", default=512)
    min_fidelity: float = key(MIN_FIDELITY_MEANING, default=MIN_FIDELITY)

    def __post_init__(self) -> None:
        require(self.max_tokens >= 1, "max_tokens", "1 or more", self.max_tokens)
        check_fidelity(self.min_fidelity, 0)


@dataclass(frozen=True, kw_only=True)
class DoctorCommand:
    """`gptoss-ft doctor`"""

    device: str | None = key("cpu, cuda or cuda:N; null is the CPU and every GPU", default=None)
    out: str | None = key("JSON file to write the report to as well", default=None)

    def __post_init__(self) -> None:
        known = self.device is None or re.fullmatch(r"cpu|cuda(:\d+)?", self.device) is not None
        require(known, "device", "cpu, cuda or cuda:N", self.device)


@dataclass(frozen=True, kw_only=True)
class DataCheckCommand(RowsConfig):
    """`gptoss-ft data check`"""


@dataclass(frozen=True, kw_only=True)
class DataRenderCommand(RowsConfig):
    """`gptoss-ft data render`"""

    out: str = key("JSONL file to write, a line for each generation")


@dataclass(frozen=True, kw_only=True)
class DataPreviewCommand(RowsConfig):
    """`gptoss-ft data preview`"""

    out: str | None = key("HTML file to write; null shows the samples in the terminal", default=None)
    count: int = key("samples to show", default=20)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.count >= 1, "count", "1 or more", self.count)


@dataclass(frozen=True, kw_only=True)
class DataClearCommand:
    """`gptoss-ft data clear`"""

    cache_dir: str | None = key("folder to clear; null is gptoss-ft/samples in the user's cache folder", default=None)
    days: float = key("remove only what was not used for so many days", default=0.0)

    def __post_init__(self) -> None:
        require(0 <= self.days < inf, "days", "0 or more and finite", self.days)
