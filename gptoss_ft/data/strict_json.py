"""JSON as the standard has it, with every number in the range of Python's own."""

import json
from math import isinf
from typing import Any

from gptoss_ft.errors import UserError


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        json.JSONDecodeError: if it is not JSON.
        UserError: if a number is NaN, infinite or too large, or the nesting is too deep; callers say where.
    """
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_float, parse_int=_int)
    except RecursionError as error:
        raise UserError("lists and objects are nested too deeply; flatten them") from error


def _refuse(constant: str) -> None:
    raise UserError(f"{constant} is not JSON; use a number or null")


def _float(text: str) -> float:
    value = float(text)
    if isinf(value):
        raise UserError(f"the number {text[:20]} is too large; write it as text")
    return value


def _int(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:  # Python reads no more than sys.get_int_max_str_digits() digits
        raise UserError(f"a number of {len(text)} digits is too large; write it as text") from error
