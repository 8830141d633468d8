"""Function tools and call arguments as OpenAI-style rows spell them."""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from itertools import chain
from math import isfinite
from typing import Any

from gptoss_ft.data.schemas.fields import MAX_WHITE_SPACE, Field, text_fault
from gptoss_ft.harmony.conversation import Tool

# One that a float cannot hold has more digits than this; so may a text.
LONG_NUMBER = re.compile(r"\d{300}")


def read_tools(tools: Sequence[Field], where: Field) -> tuple[Tool, ...]:
    """Function tools, each bare or under `{"type": "function", "function": ...}`; `where` is the list of them.

    Nulls inside a schema are dropped, as table formats fill every key that another row has with null; but where no
    other key is null, a default of null is kept.
    """
    read = tuple(map(_read_tool, tools))
    names = [tool.name for tool in read]
    if twice := {name for name in names if names.count(name) > 1}:
        raise where.error(f"several tools are called {sorted(twice)} in harmony's spelling; rename them")
    return read


def safe_name(name: Field) -> str:
    """A function's name with every character but `[A-Za-z0-9_-]` made `_`, as in `functions.name` a dot separates."""
    if not (text := name.text()):
        raise name.error("is empty; name the function")
    return re.sub(r"[^A-Za-z0-9_-]", "_", text)


def call_arguments(arguments: Field) -> str:
    """The JSON object that the model writes: a string as it is, an object compactly, nothing as `{}`."""
    if arguments.value in (None, ""):
        return "{}"
    value = arguments.parsed().value
    if not isinstance(value, Mapping):
        raise arguments.error(
            f"must be a JSON object of the function's parameters or its JSON string, not {type(value).__name__}"
            + ("; it is encoded twice, decode it once" if isinstance(value, str) else "")
        )
    if isinstance(arguments.value, str):
        return arguments.text()
    check_values(arguments)
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def read_schema(schema: Field) -> Mapping[str, Any]:
    """A JSON Schema object, without the nulls that a table has put there.

    Raises:
        FieldError: if it holds what has no place in JSON or in tokens.
    """
    schema.object()
    check_values(schema)
    return schema.value if _null_keys(schema.value) <= {"default"} else _without_nulls(schema.value)


def _read_tool(tool: Field) -> Tool:
    kind = tool["type"].value
    if kind not in ("function", None):
        raise tool["type"].error(f"{kind!r} tools cannot be used; describe it as a function")
    function = tool["function"] if tool["function"] else tool
    parameters = function["parameters"].parsed()
    return Tool(
        name=safe_name(function["name"]),
        description=function["description"].joined_text(),
        parameters=read_schema(parameters) if parameters else None,
    )


def check_values(tree: Field) -> None:
    """Raise `FieldError` for what has no place in JSON or in tokens: parsed JSON cannot hold all of it, tables can."""
    try:
        text = json.dumps(tree.value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (TypeError, ValueError):  # what JSON has no word for; NaN; half of a surrogate pair
        _name_the_fault(tree)
    else:
        # Written out and searched, a tree takes a tenth of the time that looking at each value does.
        if len(text) >= MAX_WHITE_SPACE or LONG_NUMBER.search(text):
            _name_the_fault(tree)


def _name_the_fault(tree: Field) -> None:
    match tree.value:
        case str() as text:
            if fault := text_fault(text):
                raise tree.error(fault)
        case float() as number if not isfinite(number):
            raise tree.error(f"{number} is not JSON; use a number or null")
        case int() as number if abs(number) > sys.float_info.max:
            raise tree.error("the number is too large; write it as text")
        case Mapping() as members:
            for name in members:
                if fault := text_fault(name):
                    raise tree.error(f"a key's {fault}")
                _name_the_fault(tree[name])
        case list():
            for item in tree.items():
                _name_the_fault(item)
        case None | int() | float():
            pass
        case other:
            raise tree.error(f"{type(other).__name__} has no place in JSON; write it as text")


def _null_keys(schema: Any) -> set[str]:
    """The keys that are null, at any depth."""
    if isinstance(schema, Mapping):
        inner = chain.from_iterable(map(_null_keys, schema.values()))
        return {key for key, value in schema.items() if value is None}.union(inner)
    return set(chain.from_iterable(map(_null_keys, schema))) if isinstance(schema, list) else set()


def _without_nulls(schema: Any) -> Any:
    if isinstance(schema, Mapping):
        return {key: _without_nulls(value) for key, value in schema.items() if value is not None}
    return [_without_nulls(value) for value in schema] if isinstance(schema, list) else schema
