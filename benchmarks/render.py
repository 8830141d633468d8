"""Tokens per second that the renderer makes of conversations, on one core.

    python benchmarks/render.py [--rounds 5] [--json]

The mixture: the 400 rows of the quickstart, and 400 generated conversations of several turns in which the assistant
reasons, calls functions, reads their results and answers. Timed is everything from a conversation in memory to its
samples, prompts and weights included; every round renders texts that no round before it has, so that no cache helps
more than it would in a run. Counted once is each token of a conversation, however many prompts repeat it; also printed
are the tokens of all samples, and what tiktoken alone makes of the messages' texts.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from importlib.resources import files

from gptoss_ft.data.schemas.messages import read_messages_row
from gptoss_ft.harmony.conversation import Conversation, Message, Tool
from gptoss_ft.harmony.generations import generations
from gptoss_ft.harmony.render import message_ids, opening_ids
from gptoss_ft.harmony.vocabulary import encode

PROSE = (
    "the answer depends on how many items were counted before shipping because each order can hold several boxes "
    "first check whether temperature in Zürich rises above 21.5 degrees then convert Euro prices from 2024 and sum "
    "everything carefully; otherwise return null, explain why (briefly) and list 3 alternatives with their costs"
)
WORDS = PROSE.split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one line of JSON last")
    args = parser.parse_args()

    encode("")  # loads the vocabulary
    speeds: dict[str, list[float]] = {"tokens_per_s": [], "sample_tokens_per_s": [], "tiktoken_tokens_per_s": []}
    for number in range(args.rounds):
        conversations = [*quickstart(number), *tool_conversations(400, seed=number)]
        start = time.process_time()
        samples = [sample for conversation in conversations for sample in generations(conversation)]
        seconds = time.process_time() - start
        texts = [message.content for conversation in conversations for message in conversation.messages]
        start = time.process_time()
        text_tokens = sum(len(encode(text)) for text in texts)
        tiktoken_seconds = time.process_time() - start
        once = sum(map(num_tokens, conversations))
        speeds["tokens_per_s"].append(once / seconds)
        speeds["sample_tokens_per_s"].append(sum(len(s.prompt_ids) + len(s.completion_ids) for s in samples) / seconds)
        speeds["tiktoken_tokens_per_s"].append(text_tokens / tiktoken_seconds)
        print(f"round {number}: {once} tokens in {len(samples)} samples, {seconds:.2f} s of processor time")
    medians = {name: round(statistics.median(values)) for name, values in speeds.items()}
    print(", ".join(f"{name} {value / 1e6:.2f} M" for name, value in medians.items()))
    if args.json:
        print(json.dumps(medians))


def num_tokens(conversation: Conversation) -> int:
    """Tokens of the system, developer and all other messages, each once."""
    return len(opening_ids(conversation)) + sum(len(message_ids(message)) for message in conversation.messages)


def quickstart(number: int) -> Iterator[Conversation]:
    """The vendored rows, each told apart from other rounds' by its instructions."""
    for name in ("arithmetic", "function_calls"):
        path = files("gptoss_ft") / "assets" / "quickstart" / f"{name}.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            row["messages"].insert(0, {"role": "system", "content": f"You serve customer {number}."})
            yield read_messages_row(row)


def tool_conversations(count: int, *, seed: int) -> Iterator[Conversation]:
    """Conversations of 1 to 4 questions, each answered after up to 3 calls."""
    rng = random.Random(seed)

    def text(at_least: int, at_most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(at_least, at_most)))

    for _ in range(count):
        tools = tuple(tool(rng, text) for _ in range(rng.randint(1, 6)))
        messages: list[Message] = []
        for _ in range(rng.randint(1, 4)):
            messages.append(Message("user", text(10, 80)))
            for _ in range(rng.randint(0, 3)):
                name = f"functions.{rng.choice(tools).name}"
                arguments = json.dumps({"city": text(1, 3), "limit": rng.randint(0, 99)})
                result = json.dumps({"rows": [{"id": rng.randint(0, 9999), "note": text(3, 12)} for _ in range(5)]})
                messages += [
                    Message("assistant", text(20, 120), "analysis"),
                    Message("assistant", arguments, "commentary", name, "json"),
                    Message("tool", result, "commentary", "assistant", name=name),
                ]
            messages += [Message("assistant", text(20, 200), "analysis"), Message("assistant", text(20, 150), "final")]
        yield Conversation(tuple(messages), tools=tools, instructions=text(10, 60))


def tool(rng: random.Random, text: Callable[[int, int], str]) -> Tool:
    properties = {
        "city": {"type": "string", "description": text(3, 10)},
        "limit": {"type": "integer", "default": rng.randint(1, 50)},
        "unit": {"type": "string", "enum": ["metric", "imperial"]},
        "filter": {"type": "object", "properties": {"after": {"type": "string"}, "tags": {"type": "array"}}},
    }
    schema = {"type": "object", "properties": properties, "required": ["city"]}
    return Tool(f"look_up_{rng.randint(0, 10**9)}", text(5, 20), schema)


if __name__ == "__main__":
    main()
