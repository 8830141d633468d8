"""Function tools as the TypeScript-like declarations that gpt-oss reads, character for character as openai-harmony.

What openai-harmony does not express (`anyOf`, `$ref`, `const`, numeric enums) is `any` or its plain type there, so
it is here: the prompt has to be the one that inference sends.
"""

import json
import re
from collections.abc import Collection, Sequence
from decimal import Decimal
from math import copysign
from typing import Any

from gptoss_ft.harmony.builtin import BROWSER_DESCRIPTION, BROWSER_TOOLS, PYTHON_DESCRIPTION
from gptoss_ft.harmony.conversation import FUNCTIONS, BuiltinTool, ResponseFormat, Tool

PLAIN_TYPES = {"string": "string", "number": "number", "integer": "number", "boolean": "boolean"}


def tools_section(tools: Sequence[Tool]) -> str:
    """The `# Tools` section of a developer message, with all tools in the `functions` namespace."""
    return f"# Tools\n\n## {FUNCTIONS}\n\n{_namespace(FUNCTIONS, tools)}"


def builtin_tools_section(names: Collection[BuiltinTool]) -> str:
    """The `# Tools` section of a system message; the browser comes first, in whatever order they are named."""
    sections = ["# Tools"]
    if "browser" in names:
        sections.append(f"## browser\n\n{_comments(BROWSER_DESCRIPTION)}{_namespace('browser', BROWSER_TOOLS)}")
    if "python" in names:
        sections.append(f"## python\n\n{PYTHON_DESCRIPTION}")
    return "\n\n".join(sections)


def response_formats_section(formats: Sequence[ResponseFormat]) -> str:
    """The `# Response Formats` section at the end of a developer message: compact JSON Schemas, keys in their order."""
    sections = ["# Response Formats"]
    for format in formats:
        schema = json.dumps(format.schema, ensure_ascii=False, separators=(",", ":"))
        sections.append(f"## {format.name}\n\n{_comments(format.description)}{schema}")
    return "\n\n".join(sections)


def typescript_type(schema: Any, indent: str = "") -> str:
    """The TypeScript type of a JSON Schema; anything not understood is `any`."""
    if not isinstance(schema, dict):
        return "any"
    if isinstance(variants := schema.get("oneOf"), list):
        return "".join(f"\n{indent} | {_bare_variant(variant, indent)}" for variant in variants)
    kind = schema.get("type")
    if isinstance(kind, list):
        names = ["number" if name == "integer" else name for name in kind if isinstance(name, str)]
        return " | ".join(names) or "any"
    if kind == "object":
        return _object_type(schema, indent)
    if kind == "array":
        return f"{typescript_type(schema['items'], indent)}[]" if "items" in schema else "Array<any>"
    if kind == "string" and isinstance(values := schema.get("enum"), list):
        return " | ".join(f'"{value}"' for value in values if isinstance(value, str)) or "string"
    return PLAIN_TYPES.get(kind, "any") if isinstance(kind, str) else "any"


def _namespace(name: str, tools: Sequence[Tool]) -> str:
    declarations = "\n".join(_declaration(tool) for tool in tools)
    return f"namespace {name} {{\n\n{declarations}\n}} // namespace {name}"


def _declaration(tool: Tool) -> str:
    signature = "()" if tool.parameters is None else f"(_: {typescript_type(tool.parameters)})"
    return f"{_comments(tool.description)}type {tool.name} = {signature} => any;\n"


def _comments(text: str) -> str:
    return "".join(f"// {line}\n" for line in _lines(text))


def _lines(text: str) -> list[str]:
    lines = re.split(r"\r?\n", text)
    return lines if lines[-1] else lines[:-1]


def _object_type(schema: dict[str, Any], indent: str) -> str:
    properties = schema.get("properties")
    required = schema.get("required")
    required = required if isinstance(required, list) else []
    body = ""
    if isinstance(properties, dict):
        for name, value in properties.items():
            body += _property(name if name in required else f"{name}?", value, indent)
    return f"{_comment(schema.get('description'), indent)}{{\n{body}{indent}}}"


def _property(name: str, schema: Any, indent: str) -> str:
    schema = schema if isinstance(schema, dict) else {}
    above = ""
    if isinstance(title := schema.get("title"), str):
        above += f"{indent}// {title}\n{indent}//\n"
    is_union = isinstance(schema.get("oneOf"), list)
    if not is_union:
        above += _comment(schema.get("description"), indent)
    if isinstance(examples := schema.get("examples"), list) and examples:
        above += f"{indent}// Examples:\n"
        above += "".join(f'{indent}// - "{example}"\n' for example in examples if isinstance(example, str))
    if is_union:
        return above + _union_property(name, schema, indent)
    default = "".join(f" // {text}" for text in _default(schema))
    return f"{above}{indent}{name}: {_nullable_type(schema, indent + '    ')},{default}\n"


def _union_property(name: str, schema: dict[str, Any], indent: str) -> str:
    """A `oneOf` property: its description and default above it, one variant a line."""
    variants, description = schema["oneOf"], schema.get("description")
    first = variants[0] if variants and isinstance(variants[0], dict) else {}
    described_above = isinstance(description, str) and description != first.get("description")
    text = _comment(description, indent) if described_above else ""
    text += "".join(f"{indent}// {default}\n" for default in _default(schema))
    text += f"{indent}{name}:\n"
    for index, variant in enumerate(variants):
        is_described = (index == 0 and described_above) or _description(variant) == [description]
        comments = [] if is_described else _description(variant)
        text += f"{indent} | {_nullable_type(variant, indent + '   ')}{_trailing(comments + _default(variant))}\n"
    return f"{text}{indent},\n"


def _bare_variant(variant: Any, indent: str) -> str:
    """A variant of a `oneOf` that is no property (array items, parameters)."""
    # Only here does openai-harmony quote the default of an enum.
    comments = _description(variant) + _default(variant, quote_enum=True)
    return _nullable_type(variant, indent + "   ") + _trailing(comments)


def _nullable_type(schema: Any, indent: str) -> str:
    text = typescript_type(schema, indent)
    is_nullable = isinstance(schema, dict) and schema.get("nullable") is True
    return f"{text} | null" if is_nullable and "null" not in text else text


def _comment(text: Any, indent: str) -> str:
    return f"{indent}// {text}\n" if isinstance(text, str) else ""


def _trailing(comments: list[str]) -> str:
    return f" // {' '.join(comments)}" if comments else ""


def _description(schema: Any) -> list[str]:
    text = schema.get("description") if isinstance(schema, dict) else None
    return [text] if isinstance(text, str) else []


def _default(schema: Any, *, quote_enum: bool = False) -> list[str]:
    """`default: ...` if there is one; a string is quoted but not escaped, an enum's string not even quoted."""
    if not isinstance(schema, dict) or "default" not in schema:
        return []
    value = schema["default"]
    if not isinstance(value, str):
        return [f"default: {_json(value)}"]
    if not (isinstance(schema.get("enum"), list) and schema["enum"]):
        return [f'default: "{value}"']
    return [f"default: {_json(value) if quote_enum else value}"]


def _json(value: Any) -> str:
    """Compact JSON with numbers spelled as Rust's serde_json does: 0.00001 and 1e16, not 1e-05 and 1e+16."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{_json(key)}:{_json(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_json, value)) + "]"
    if isinstance(value, float) or (isinstance(value, int) and not -(2**63) <= value < 2**64):
        return _float(_as_read_by_serde_json(value))
    return json.dumps(value, ensure_ascii=False)


def _as_read_by_serde_json(value: int | float) -> float:
    """The float that openai-harmony gets of a number written as JSON.

    serde_json takes as many leading digits as fit into 64 bits, rounds them to a float and scales that by a power of
    ten, which rounds again: the last digit of a number with 16 digits or more may differ from the nearest float's.
    """
    mantissa, _, exponent = repr(abs(value)).partition("e")
    whole, _, fraction = mantissa.partition(".")
    digits = (whole + fraction).lstrip("0") or "0"
    kept = digits[: 20 if int(digits[:20]) < 2**64 else 19]
    power = int(exponent or 0) - len(fraction) + len(digits) - len(kept)
    size = float(int(kept))
    if power < -308:  # beyond serde_json's table of powers
        size, power = size / 1e308, power + 308
    size = size * float(f"1e{power}") if power >= 0 else size / float(f"1e{-power}")
    return -size if copysign(1, value) < 0 else size


def _float(value: float) -> str:
    number = Decimal(repr(value)).normalize()
    sign, digits, exponent = number.as_tuple()
    point = len(digits) + int(exponent)
    if not value or -5 < point <= 16:
        text = format(number, "f")
        return text if "." in text else f"{text}.0"
    fraction = "".join(map(str, digits[1:]))
    return f"{'-' if sign else ''}{digits[0]}{'.' if fraction else ''}{fraction}e{point - 1}"
