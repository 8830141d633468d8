"""Tokens per second from rows to samples, what several processes gain, and what memory a ten times larger file takes.

    python benchmarks/render.py [--rows 4000] [--json]

Rows are the quickstart's, each with a number of its own in every text and tool, so that nothing but what real rows
share is found in a cache:

    reasoning   a question, a chain of thought and an answer
    calls       tools with their schemas, a question and calls
    trace       a loop of 20 calls with their results; each of its samples repeats the ones before

`render` goes from rows in memory to token ids and loss weights, `compile` from a JSON Lines file to the file of samples
that training reads. Tokens are those of all samples. Speed with one process is by processor time, which another job's
use of the cores hardly changes; the gain of several is by the clock. Memory is the peak of a process that compiles.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.resources import files
from itertools import count, islice
from pathlib import Path
from typing import Any

from gptoss_ft.data.dataset import compile_samples
from gptoss_ft.data.rows import RowSettings
from gptoss_ft.data.schemas.messages import read_messages_row
from gptoss_ft.harmony.generations import generations

CALLS_OF_A_TRACE = 20
LARGER = 10
LONGEST = 131_072
MEASURE_PEAK = """
import json, resource, sys
from gptoss_ft.data.dataset import compile_samples
compiled = compile_samples([sys.argv[1]], max_length=131072)
print(json.dumps([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, compiled.tokens]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4000, help="rows of each kind; traces are a tenth of that")
    parser.add_argument("--rounds", type=int, default=3, help="the fastest counts")
    parser.add_argument("--json", action="store_true", help="print one line of JSON last")
    args = parser.parse_args()
    kinds = {"reasoning": reasoning(), "calls": calls(), "trace": traces()}
    result: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind, source in kinds.items():
            rows = list(islice(source, args.rows // 10 if kind == "trace" else args.rows))
            path = write(rows, Path(folder, f"{kind}.jsonl"))
            speeds = {
                "render": max(speed(lambda rows=rows: render(rows)) for _ in range(args.rounds)),
                "compile": max(speed(lambda path=path: compiled(path)) for _ in range(args.rounds)),
            }
            for name, found in speeds.items():
                print(f"{kind:<10} {name:<8} {found / 1e6:6.2f} M tokens/s")
                result[f"{kind}_{name}_tokens_per_s"] = round(found)
        result |= gain(Path(folder), args.rows)
        result |= memory(Path(folder), args.rows)
    if args.json:
        print(json.dumps(result))


def gain(folder: Path, num_rows: int) -> dict[str, float]:
    """How many times as fast all cores are, with the start of the processes."""
    source, num_processes = calls(), len(os.sched_getaffinity(0))
    path = write(list(islice(source, LARGER * num_rows)), folder / "calls-large.jsonl")
    seconds = []
    for processes in (1, num_processes):
        start = time.perf_counter()
        compiled(path, processes)
        seconds.append(time.perf_counter() - start)
    alone, together = seconds
    print(f"{path.stat().st_size / 1e6:.0f} MB: 1 process {alone:.1f} s, {num_processes} processes {together:.1f} s")
    return {"one_process_seconds": alone, "all_processes_seconds": together, "processes_speedup": alone / together}


def memory(folder: Path, num_rows: int) -> dict[str, float]:
    """Peak resident memory for a file and for one that is ten times as large."""
    found: dict[str, float] = {}
    for name, times in (("small", 1), ("large", LARGER)):
        path = write(list(islice(calls(), times * num_rows)), folder / f"{name}.jsonl")
        command = [sys.executable, "-c", MEASURE_PEAK, str(path)]
        peak, tokens = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
        print(f"{path.stat().st_size / 1e6:6.1f} MB, {tokens / 1e6:.1f} M tokens: peak {peak / 2**20:.0f} MiB")
        found[f"peak_{name}_file_bytes"] = peak
    return {**found, "peak_memory_ratio": found["peak_large_file_bytes"] / found["peak_small_file_bytes"]}


def render(rows: list[dict[str, Any]]) -> int:
    """Tokens of the samples of rows in memory."""
    tokens = 0
    for row in rows:
        for sample in generations(read_messages_row(row)):
            tokens += len(sample.prompt_ids) + len(sample.completion_ids)
    return tokens


def compiled(path: Path, num_processes: int = 1) -> int:
    """Tokens of the samples of a file, which are written."""
    return compile_samples([path], rows=RowSettings(num_processes=num_processes), max_length=LONGEST).tokens


def speed(work: Callable[[], int]) -> float:
    """Tokens per second of processor time."""
    start = time.process_time()
    return work() / (time.process_time() - start)


def reasoning() -> Iterator[dict[str, Any]]:
    return (numbered(row, number) for number, row in enumerate(repeated("arithmetic.jsonl")))


def calls() -> Iterator[dict[str, Any]]:
    return (numbered(row, number) for number, row in enumerate(repeated("function_calls.jsonl")))


def traces() -> Iterator[dict[str, Any]]:
    """Each a question of the calls' with its first call many times."""
    for number, row in enumerate(repeated("function_calls.jsonl")):
        messages = row["messages"]
        first = next(at for at, message in enumerate(messages) if message.get("tool_calls"))
        call = {**messages[first], "tool_calls": messages[first]["tool_calls"][:1], "thinking": "I look it up."}
        loop = [call, {"role": "tool", "content": f"Nothing was found in file {number}: look further."}]
        answer = {"role": "assistant", "thinking": "That is all.", "content": "It is not there."}
        yield numbered({**row, "messages": [*messages[:first], *loop * CALLS_OF_A_TRACE, answer]}, number)


def repeated(name: str) -> Iterator[dict[str, Any]]:
    lines = (files("gptoss_ft") / "assets" / "quickstart" / name).read_text(encoding="utf-8").splitlines()
    return (json.loads(lines[number % len(lines)]) for number in count())


def numbered(row: dict[str, Any], number: int) -> dict[str, Any]:
    """The row with a number in its messages and in the descriptions of its tools."""
    messages = [
        {**message, "content": f"{message['content']} ({number}.{at})"} if message.get("content") else message
        for at, message in enumerate(row["messages"])
    ]
    tools = [
        {**tool, "function": {**tool["function"], "description": f"{tool['function'].get('description')} ({number})"}}
        for tool in row.get("tools") or []
    ]
    return {**row, "messages": messages, **({"tools": tools} if tools else {})}


def write(rows: list[dict[str, Any]], path: Path) -> Path:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path


if __name__ == "__main__":
    main()
