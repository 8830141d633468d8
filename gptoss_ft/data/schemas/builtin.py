"""The tools of the model's own training, and shapes for answers, as rows ask for them.

A row offers built-in tools by `builtin_tools` (Hugging Face's template argument) or among its tools by OpenAI's types.
"""

from typing import cast, get_args

from gptoss_ft.data.schemas.fields import Field
from gptoss_ft.data.schemas.functions import call_arguments, read_schema
from gptoss_ft.harmony.conversation import BuiltinTool, Message, ResponseFormat

NAMES: tuple[BuiltinTool, ...] = get_args(BuiltinTool)
OPENAI_TYPES: dict[str, BuiltinTool] = {
    "browser_search": "browser",
    "web_search": "browser",
    "web_search_preview": "browser",
    "code_interpreter": "python",
}
BROWSER_CALLS = ("browser.search", "browser.open", "browser.find")


def split_tools(tools: Field, named: Field) -> tuple[list[Field], tuple[BuiltinTool, ...]]:
    """The function tools of a row, and the built-in ones by name, each once.

    Args:
        tools: a list of tools or its JSON string.
        named: a list of built-in tools' names.

    Raises:
        FieldError: if a name is not a built-in tool's.
    """
    functions: list[Field] = []
    builtin: list[BuiltinTool] = []
    for name in named.parsed_list() if named else []:
        if name.value not in NAMES:
            raise name.error(f"{name.value!r} is not a built-in tool; use one of {', '.join(NAMES)}")
        builtin.append(cast(BuiltinTool, name.value))
    for tool in tools.parsed().items() if tools else []:
        kind = tool["type"].value
        if isinstance(kind, str) and kind in OPENAI_TYPES:
            builtin.append(OPENAI_TYPES[kind])
        else:
            functions.append(tool)
    return functions, tuple(dict.fromkeys(builtin))


def builtin_call(name: Field, arguments: Field, offered: tuple[BuiltinTool, ...]) -> Message | None:
    """The call if `name` is that of a tool on `offered`: Python's code as it is, a browser's arguments as JSON."""
    if name.value == "python" and "python" in offered:
        given = (
            arguments.parsed() if isinstance(arguments.value, str) and arguments.value.startswith("{") else arguments
        )
        code = given if isinstance(given.value, str) else given["code"]
        return Message("assistant", code.text(), "analysis", "python", "code", constrained=False)
    if name.value in BROWSER_CALLS and "browser" in offered:
        written = call_arguments(arguments)
        return Message("assistant", written, "analysis", str(name.value), "code", constrained=False)
    return None


def read_response_format(field: Field) -> tuple[ResponseFormat, ...]:
    """The shape that OpenAI's `response_format` asks for; none for plain text and for JSON of any shape.

    Raises:
        FieldError: if it is not of a known type.
    """
    if not field:
        return ()
    shape = field.parsed()
    kind = shape["type"].value
    if kind in ("text", "json_object"):
        return ()
    if kind != "json_schema":
        raise shape["type"].error(f"{kind!r} is not a response format; use json_schema")
    described = shape["json_schema"]
    schema = read_schema(described["schema"].parsed())
    return (ResponseFormat(described["name"].text(), schema, described["description"].joined_text()),)
