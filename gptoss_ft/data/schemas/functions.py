"""Function tools and call arguments as OpenAI-style rows spell them."""

import json
import re
from collections.abc import Mapping
from typing import Any

from gptoss_ft.data.schemas.fields import Field
from gptoss_ft.harmony.conversation import Tool


def read_tools(tools: Field) -> tuple[Tool, ...]:
    """Tools given as a list or as its JSON string, each bare or under `{"type": "function", "function": ...}`.

    Nulls inside a schema are dropped: table formats fill every key that another row has with null.
    """
    if not tools:
        return ()
    read = tuple(map(_read_tool, tools.parsed().items()))
    names = [tool.name for tool in read]
    if twice := {name for name in names if names.count(name) > 1}:
        raise tools.error(f"several tools are called {sorted(twice)} in harmony's spelling; rename them")
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
        return arguments.value
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _read_tool(tool: Field) -> Tool:
    kind = tool["type"].value
    if kind not in ("function", None):
        raise tool["type"].error(f"{kind!r} tools cannot be used; describe it as a function")
    function = tool["function"] if tool["function"] else tool
    parameters = function["parameters"].parsed()
    return Tool(
        name=safe_name(function["name"]),
        description=function["description"].joined_text(),
        parameters=_without_nulls(parameters.object()) if parameters else None,
    )


def _without_nulls(schema: Any) -> Any:
    if isinstance(schema, Mapping):
        return {key: _without_nulls(value) for key, value in schema.items() if value is not None}
    return [_without_nulls(value) for value in schema] if isinstance(schema, list) else schema
