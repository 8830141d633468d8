"""What a long merge has rounded so far, kept beside its output, so that a later run of the same merge goes on there."""

import json
import re
import shutil
import zlib
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from gptoss_ft.errors import UserError
from gptoss_ft.export.merged import PackedUpdate, Rounded, packed_digest, tensor_digest
from gptoss_ft.files import naming_a_bad_place, naming_a_full_disk, partial_of
from gptoss_ft.mxfp4.round import UpdateStats


class Journal:
    """Rounded experts in a hidden folder beside `out`, whose name says of what they are.

    Args:
        key: a digest of all that decides how experts are rounded, see `digest`.

    Raises:
        UserError: if the folder cannot be written.
    """

    def __init__(self, out: Path, key: str) -> None:
        if not out.name:
            raise UserError(f"out={out} is a folder that exists: name a new one")
        self.out = out
        self.folder = out.with_name(f"{_prefix(out)}{key[:16]}")
        with naming_a_bad_place(out):
            self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def num_weights(self) -> int:
        """How many expert weights are in it."""
        return sum(not file.name.startswith(".") for file in self.folder.iterdir())

    def read(self, name: str, expert: int, update: PackedUpdate) -> Rounded | None:
        """What was noted of an expert of the stack `name`."""
        try:
            content = zlib.decompress(self._file(name, expert).read_bytes())
        except (FileNotFoundError, zlib.error):  # a machine that lost power leaves empty files
            return None
        line, _, changes = content.partition(b"\n")
        head = json.loads(line)
        # Changes are from these very bytes: the key samples the base, and takes two writings of one number for equal.
        if head.get("base") != _base_digest(update):
            return None
        parts = _bytes_of(update)
        changed = torch.frombuffer(bytearray(changes), dtype=torch.uint8).split([part.numel() for part in parts])
        blocks, scales, bias = (part ^ change.view_as(part) for part, change in zip(parts, changed, strict=True))
        return Rounded(blocks, scales, bias.view(update.bias.dtype), UpdateStats(**head["stats"]))

    def write(self, name: str, expert: int, update: PackedUpdate, rounded: Rounded) -> None:
        """Note what an expert was rounded to.

        Raises:
            UserError: if the disk is full.
        """
        # Most codes are the base's: what differs from them compresses well.
        pairs = zip(_bytes_of(update), _bytes_of(rounded), strict=True)
        changes = b"".join((old ^ new).numpy().tobytes() for old, new in pairs)
        head = {"base": _base_digest(update), "stats": vars(rounded.stats)}
        content = json.dumps(head).encode() + b"\n" + changes
        file = self._file(name, expert)
        partial = partial_of(file)
        with naming_a_full_disk(self.out):
            # An export to the same place that ended meanwhile has removed it.
            self.folder.mkdir(exist_ok=True)
            partial.write_bytes(zlib.compress(content, level=1))
            partial.replace(file)

    def _file(self, name: str, expert: int) -> Path:
        return self.folder / f"{name}.{expert}"


def remove_journals(out: Path) -> None:
    """Remove the journals of all merges into `out`, once it is there and nothing will go on with them."""
    name = re.compile(re.escape(_prefix(out)) + "[0-9a-f]{16}")
    for folder in out.parent.iterdir():
        if name.fullmatch(folder.name):
            shutil.rmtree(folder, ignore_errors=True)


def digest(parts: Iterable[object]) -> str:
    """A sha256 of the texts of `parts`."""
    found = sha256()
    for part in parts:
        found.update(f"{part}\n".encode())
    return found.hexdigest()


def _bytes_of(expert: PackedUpdate | Rounded) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks, scales and bias as bytes."""
    return expert.blocks, expert.scales, expert.bias.view(torch.uint8)


def _base_digest(update: PackedUpdate) -> str:
    return packed_digest(update.blocks, update.scales) + tensor_digest(update.bias)


def _prefix(out: Path) -> str:
    return f".{out.name}.rounded-"
