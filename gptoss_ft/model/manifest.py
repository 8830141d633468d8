"""What a finished export consists of: manifest.json names every file with its size and sha256.

It is written last, so a folder with one was written to its end, and a file that was changed or cut short since shows.
"""

import json
from hashlib import file_digest, sha256
from io import BufferedWriter, FileIO
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gptoss_ft.errors import UserError

MANIFEST_FILE = "manifest.json"
READ_BYTES = 1 << 24
CURE = f"export again, or remove {MANIFEST_FILE} if it was changed on purpose"


class HashedFile(BufferedWriter):
    """A new file whose bytes are hashed as they are written, since reading 14 GB again takes its time."""

    def __init__(self, path: Path) -> None:
        super().__init__(FileIO(path, "wb"))
        self.sha256 = sha256()

    def write(self, data: Any, /) -> int:
        self.sha256.update(data)
        return super().write(data)


class Manifest:
    """The manifest of a folder that is being filled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, HashedFile] = {}

    def open(self, path: Path) -> HashedFile:
        """Open a large file of the folder for writing, from the start to the end."""
        return self.files.setdefault(path.name, HashedFile(path))

    def write(self, format: str) -> None:
        """Write manifest.json; files that were not written through `open` are read."""
        entries = {}
        for path in sorted(self.folder.iterdir()):
            if (file := self.files.get(path.name)) is None:
                with path.open("rb") as content:
                    digest = file_digest(content, "sha256").hexdigest()
            else:
                digest = file.sha256.hexdigest()
            entries[path.name] = {"size": path.stat().st_size, "sha256": digest}
        text = json.dumps({"format": format, "files": entries}, indent=2) + "\n"
        (self.folder / MANIFEST_FILE).write_text(text, encoding="utf-8")


def add_to_manifest(folder: Path, name: str) -> None:
    """Name one more file in the manifest of a folder that has one: what could be written only after all others."""
    content = (folder / name).read_bytes()
    manifest = json.loads((folder / MANIFEST_FILE).read_bytes())
    manifest["files"][name] = {"size": len(content), "sha256": sha256(content).hexdigest()}
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def check_sizes(folder: Path) -> None:
    """Raise UserError, naming the first file that is missing or has another size than in manifest.json, if it has one.

    Reads no file but the manifest.
    """
    for name, entry in _files(folder).items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing, and {MANIFEST_FILE} names it: {CURE}")
        if (size := path.stat().st_size) != entry["size"]:
            raise UserError(f"{path} has {size} bytes where {MANIFEST_FILE} says {entry['size']}: {CURE}")


def check_hashes(folder: Path, *, progress: bool = False) -> None:
    """Raise UserError, naming the first file that is not the one in manifest.json, if the folder has one."""
    check_sizes(folder)
    files = _files(folder)
    total = sum(entry["size"] for entry in files.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="hashing the files", disable=not progress) as bar:
        for name, entry in files.items():
            digest = sha256()
            with (folder / name).open("rb") as content:
                while piece := content.read(READ_BYTES):
                    digest.update(piece)
                    bar.update(len(piece))
            if digest.hexdigest() != entry["sha256"]:
                raise UserError(f"{folder / name} has another sha256 than in {MANIFEST_FILE}: it was changed; {CURE}")


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    file = folder / MANIFEST_FILE
    if not file.is_file():
        return {}
    try:
        files = json.loads(file.read_bytes())["files"]
        if all(isinstance(entry["size"], int) and isinstance(entry["sha256"], str) for entry in files.values()):
            return files
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged ({error!r}): {CURE}") from error
    raise UserError(f"{file} is damaged: {CURE}")
