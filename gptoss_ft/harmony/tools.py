"""Function tools as the TypeScript-like declarations that gpt-oss reads, character for character as openai-harmony.

What openai-harmony does not express (`anyOf`, `$ref`, `const`, numeric enums) is `any` or its plain type there, so
it is here: the prompt has to be the one that inference sends.
"""

import json
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from gptoss_ft.harmony.conversation import FUNCTIONS, Tool

PLAIN_TYPES = {"string": "string", "number": "number", "integer": "number", "boolean": "boolean"}


def tools_section(tools: Sequence[Tool]) -> str:
    """The `# Tools` section of a developer message, with all tools in the `functions` namespace."""
    declarations = "\n".join(_declaration(tool) for tool in tools)
    return f"# Tools\n\n## {FUNCTIONS}\n\nnamespace {FUNCTIONS} {{\n\n{declarations}\n}} // namespace {FUNCTIONS}"


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


def _declaration(tool: Tool) -> str:
    signature = "()" if tool.parameters is None else f"(_: {typescript_type(tool.parameters)})"
    comments = "".join(f"// {line}\n" for line in _lines(tool.description))
    return f"{comments}type {tool.name} = {signature} => any;\n"


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
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        value = _float_of_long(value)
    return _float(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def _float_of_long(value: int) -> float:
    """An integer beyond 64 bits as serde_json reads it: the digits that fit into 64 bits times a power of ten.

    Both are rounded, so that the last digit may differ from the nearest float's.
    """
    digits = str(abs(value))
    kept = next(count for count in (20, 19) if int(digits[:count]) < 2**64)
    size = float(int(digits[:kept])) * float(f"1e{max(len(digits) - kept, 0)}")
    return -size if value < 0 else size


def _float(value: float) -> str:
    number = Decimal(repr(value)).normalize()
    sign, digits, exponent = number.as_tuple()
    point = len(digits) + int(exponent)
    if not value or -5 < point <= 16:
        text = format(number, "f")
        return text if "." in text else f"{text}.0"
    fraction = "".join(map(str, digits[1:]))
    return f"{'-' if sign else ''}{digits[0]}{'.' if fraction else ''}{fraction}e{point - 1}"
