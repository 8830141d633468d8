"""Rebuild the quickstart's rows from the two packages they come from, byte for byte.

    python -m venv /tmp/data
    /tmp/data/bin/pip install --no-deps bfcl-eval==2026.3.23
    /tmp/data/bin/pip install reasoning-gym==0.1.25
    /tmp/data/bin/python examples/quickstart/build_data.py --out gptoss_ft/assets/quickstart

`--no-deps` matters: bfcl-eval pins some thirty packages that its data files do not need.
"""

import argparse
import json
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from random import Random
from typing import Any

SEED = 0
VERSIONS = {"bfcl-eval": "2026.3.23", "reasoning-gym": "0.1.25"}
# Rows of each BFCL category; a "parallel" row has several calls.
CATEGORIES = {"simple_python": 90, "multiple": 70, "parallel": 40}
NUM_PROBLEMS = 200
# About 900 tokens.
MAX_ROW_CHARACTERS = 3200

# BFCL names types as Python does; JSON Schema names them so. It has no word for `any`: no type says that.
JSON_TYPES = {"dict": "object", "float": "number", "tuple": "array"}
PYTHON_TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the two JSONL files to")
    out = parser.parse_args().out
    check_packages()
    out.mkdir(parents=True, exist_ok=True)
    write_jsonl(out / "function_calls.jsonl", function_call_rows())
    write_jsonl(out / "arithmetic.jsonl", arithmetic_rows())


def check_packages() -> None:
    for package, version in VERSIONS.items():
        try:
            found = distribution(package).version
        except PackageNotFoundError:
            found = "none"
        if found != version:
            raise SystemExit(f"{package} {version} is needed, found {found}; install it so:\n{__doc__}")


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    lines = (json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(f"{path}: {len(rows)} rows")


def function_call_rows() -> list[dict[str, Any]]:
    """Single-turn questions and the calls that answer them."""
    random = Random(SEED)
    rows = []
    for category, num_rows in CATEGORIES.items():
        usable = [row for row in bfcl_rows(category) if len(json.dumps(row, ensure_ascii=False)) <= MAX_ROW_CHARACTERS]
        rows += random.sample(usable, num_rows)
    random.shuffle(rows)
    return rows


def bfcl_rows(category: str) -> Iterator[dict[str, Any]]:
    folder = Path(str(distribution("bfcl-eval").locate_file("bfcl_eval"))) / "data"
    answers = {
        row["id"]: row["ground_truth"] for row in read_jsonl(folder / f"possible_answer/BFCL_v4_{category}.json")
    }
    for row in read_jsonl(folder / f"BFCL_v4_{category}.json"):
        (messages,) = row["question"]
        functions = [{**function, "parameters": json_schema(function["parameters"])} for function in row["function"]]
        schemas = {function["name"]: function["parameters"] for function in functions}
        calls = [
            {"name": name, "arguments": first_alternatives(arguments)}
            for call in answers[row["id"]]
            for name, arguments in call.items()
        ]
        is_sound = all(conforms(call["arguments"], schemas[call["name"]]) for call in calls)
        if is_sound and [message["role"] for message in messages] == ["user"]:
            tool_calls = [{"type": "function", "function": call} for call in calls]
            yield {
                "messages": [*messages, {"role": "assistant", "tool_calls": tool_calls}],
                "tools": [{"type": "function", "function": function} for function in functions],
                "reasoning_effort": "low",
            }


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def json_schema(schema: Any) -> Any:
    if isinstance(schema, list):
        return [json_schema(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    normal = {key: json_schema(value) for key, value in schema.items()}
    if isinstance(kind := schema.get("type"), str):
        normal["type"] = JSON_TYPES.get(kind, kind)
        if kind == "any":
            del normal["type"]
    return normal


def first_alternatives(arguments: dict[str, list[Any]]) -> dict[str, Any]:
    """The first accepted value of each argument, without those that may be left out (first value "")."""
    return {name: resolved(values[0]) for name, values in arguments.items() if values and values[0] != ""}


def resolved(value: Any) -> Any:
    """BFCL lists alternatives inside nested objects too."""
    if isinstance(value, dict):
        return first_alternatives(value)
    return [resolved(item) for item in value] if isinstance(value, list) else value


def conforms(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a call's value has the declared types and all required members; a few ground truths have not."""
    kind = schema.get("type")
    if kind is None:
        return True
    if not isinstance(value, PYTHON_TYPES[kind]) or (isinstance(value, bool) and kind != "boolean"):
        return False
    if kind == "array":
        return all(conforms(item, schema.get("items", {})) for item in value)
    if kind == "object":
        members = schema.get("properties", {})
        return set(schema.get("required", ())) <= set(value) and all(
            name in members and conforms(item, members[name]) for name, item in value.items()
        )
    return value in schema.get("enum", [value])


def arithmetic_rows() -> list[dict[str, Any]]:
    """Word problems, each with its worked solution as thinking and the bare number as answer."""
    import reasoning_gym

    rows: dict[str, dict[str, Any]] = {}
    for problem in reasoning_gym.create_dataset("gsm_symbolic", size=2 * NUM_PROBLEMS, seed=SEED):
        worked, _, result = problem["metadata"]["answer_cot"].partition("\n#### ")
        question, answer = problem["question"], problem["answer"]
        if result == answer and answer.isdigit():
            messages = [
                {"role": "user", "content": question},
                {"role": "assistant", "thinking": worked, "content": answer},
            ]
            rows.setdefault(question, {"messages": messages, "reasoning_effort": "medium"})
    return list(rows.values())[:NUM_PROBLEMS]


if __name__ == "__main__":
    main()
