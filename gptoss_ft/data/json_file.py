"""A JSON file as a sequence of rows: the objects of one list, or objects one after the other, in any layout.

The file is never held as a whole: a window moves over it that is as long as the longest row.
"""

import codecs
import json
from collections.abc import Iterator
from typing import BinaryIO

from gptoss_ft.errors import RestUnreadableError, UserError

WINDOW = 2**16
SPACE = " \t\r\n"
# Finds where a value ends; the value itself is read strictly, later.
SCANNER = json.JSONDecoder(parse_int=str, parse_float=str)


def json_objects(file: BinaryIO, max_bytes: int) -> Iterator[tuple[int, bytes | UserError]]:
    """Yield each row's first line and its JSON text.

    The first row that is not JSON ends the file with a `RestUnreadableError`.
    """
    window = _Window(file)
    in_list = window.peek() == "["
    if in_list:
        window.skip(1)
    while window.peek():
        if in_list and window.text[0] == "]":
            window.skip(1)
            if window.peek():
                yield window.line, RestUnreadableError("something follows the list of rows; remove it")
            return
        line = window.line
        end = window.end_of_value(max_bytes)
        if isinstance(end, UserError):
            yield line, end
            return
        yield line, window.text[:end].encode("utf-8", "surrogateescape")
        window.skip(end)
        if in_list and window.peek() == ",":
            window.skip(1)
            if window.peek() in ("]", ""):
                yield window.line, RestUnreadableError("a comma has no row behind it; remove it")
                return
        elif in_list and window.peek() != "]":
            yield window.line, RestUnreadableError("the list of rows does not go on with , or ]; mend the JSON")
            return


class _Window:
    """The next stretch of the file as text, and the line that it begins on."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self._is_at_end = False
        self.text = ""
        self.line = 1

    def peek(self) -> str:
        """The next character that is not white space, now the first of the window; nothing at the end of the file."""
        while True:
            blank = len(self.text) - len(self.text.lstrip(SPACE))
            self.skip(blank)
            if self.text or not self._read(WINDOW):
                return self.text[:1]

    def skip(self, count: int) -> None:
        self.line += self.text.count("\n", 0, count)
        self.text = self.text[count:]

    def end_of_value(self, max_bytes: int) -> int | UserError:
        """Where the JSON value ends that the window begins with; reads on until it is whole."""
        while True:
            try:
                _, end = SCANNER.raw_decode(self.text)
                return end
            except RecursionError:
                return RestUnreadableError("lists and objects are nested too deeply; flatten them")
            except json.JSONDecodeError as error:
                if len(self.text) > max_bytes:
                    return RestUnreadableError(
                        f"no row ends within {max_bytes // 2**20} MiB; mend the JSON or split the row"
                    )
                # Twice as much each time: what is parsed again stays below what is parsed once.
                if not self._read(max(WINDOW, len(self.text))):
                    return RestUnreadableError(f"not JSON ({error.msg} in line {self.line + error.lineno - 1})")

    def _read(self, num_bytes: int) -> bool:
        """Whether there was more."""
        if self._is_at_end:
            return False
        content = self._file.read(num_bytes)
        self._is_at_end = not content
        # A byte that is not UTF-8 goes through to its row, where it is named.
        self.text += self._decoder.decode(content, final=self._is_at_end)
        return not self._is_at_end
