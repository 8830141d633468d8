"""Which of a conversation's tokens have loss, read off the text that has it."""

from dataclasses import replace

import pytest

from gptoss_ft.harmony.conversation import Conversation, Message
from gptoss_ft.harmony.generations import generations
from gptoss_ft.harmony.vocabulary import decode
from gptoss_ft.harmony.weights import LossRules

QUESTION = Message("user", "q1")
THOUGHT = Message("assistant", "t1", "analysis")
CODE = Message("assistant", "1+1", "analysis", "python", "code", constrained=False)
OUTPUT = Message("tool", "2", "analysis", "assistant", name="python")
PREAMBLE = Message("assistant", "p1", "commentary")
CALL = Message("assistant", "{}", "commentary", "functions.f", "json")
RESULT = Message("tool", "r1", "commentary", "assistant", name="functions.f")
AFTERTHOUGHT = Message("assistant", "t2", "analysis")
ANSWER = Message("assistant", "a1", "final")
FIRST = (QUESTION, THOUGHT, CODE, OUTPUT, PREAMBLE, CALL, RESULT, AFTERTHOUGHT, ANSWER)
SECOND = (Message("user", "q2"), Message("assistant", "t3", "analysis"), Message("assistant", "a2", "final"))

BODY = {
    "t1": "<|channel|>analysis<|message|>t1<|end|>",
    "1+1": "<|start|>assistant<|channel|>analysis to=python code<|message|>1+1<|call|>",
    "p1": "<|channel|>commentary<|message|>p1<|end|>",
    "{}": "<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>",
    "t2": "<|channel|>analysis<|message|>t2<|end|>",
    "a1": "<|start|>assistant<|channel|>final<|message|>a1<|return|>",
    "t3": "<|channel|>analysis<|message|>t3<|end|>",
    "a2": "<|start|>assistant<|channel|>final<|message|>a2<|return|>",
}


def learned(messages, rules, **settings):
    """The text that has loss, of each generation."""
    samples = generations(Conversation(messages, **settings), rules)
    return [
        decode([token for token, weight in zip(s.completion_ids, s.loss_weights, strict=True) if weight])
        for s in samples
    ]


def bodies(*names):
    return "".join(BODY[name] for name in names)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("all", [("t1", "1+1"), ("p1", "{}"), ("t2", "a1"), ("t3", "a2")]),
        ("last_turn", [(), (), (), ("t3", "a2")]),
        ("final_only", [(), (), ("a1",), ("a2",)]),
        ("no_reasoning", [("1+1",), ("p1", "{}"), ("a1",), ("a2",)]),
        ("tool_calls_only", [("1+1",), ("{}",), (), ()]),
    ],
)
def test_policies(policy, expected):
    assert learned(FIRST + SECOND, LossRules(policy=policy)) == [bodies(*names) for names in expected]


def test_the_last_turn_is_the_whole_tool_loop():
    assert learned(FIRST, LossRules(policy="last_turn")) == learned(FIRST, LossRules())


def test_preambles_have_a_switch_of_their_own():
    without = [bodies("t1", "1+1"), bodies("{}"), bodies("t2", "a1")]
    assert learned(FIRST, LossRules(preambles=False)) == without


def test_weights_of_channels_and_messages_multiply():
    light = replace(AFTERTHOUGHT, weight=0.5)
    (sample,) = generations(Conversation((QUESTION, light, ANSWER)), LossRules(analysis=0.5, final=3.0))
    of_thought = len(["<|channel|>", "analysis", "<|message|>", "t", "2", "<|end|>"])
    assert sample.loss_weights[:of_thought] == [0.25] * of_thought
    assert set(sample.loss_weights[of_thought:]) == {3.0}
    (call, *_) = generations(Conversation((QUESTION, CODE)), LossRules(analysis=0.5, commentary=9.0))
    assert set(call.loss_weights) == {0.5}


class TestMissingReasoning:
    ROW = (*SECOND, QUESTION, CALL, RESULT, ANSWER)
    CALL_TEXT = BODY["{}"].removeprefix("<|start|>assistant")
    ANSWER_TEXT = BODY["a1"].removeprefix("<|start|>assistant")

    def test_keep(self):
        expected = [bodies("t3", "a2"), self.CALL_TEXT, self.ANSWER_TEXT]
        assert learned(self.ROW, LossRules()) == expected

    def test_mask_channel_leaves_the_choice_not_to_reason_without_loss(self):
        assert learned(self.ROW, LossRules(missing_reasoning="mask_channel")) == [
            bodies("t3", "a2"),
            self.CALL_TEXT.removeprefix("<|channel|>commentary"),
            self.ANSWER_TEXT.removeprefix("<|channel|>final"),
        ]

    def test_drop(self):
        assert learned(self.ROW, LossRules(missing_reasoning="drop")) == [bodies("t3", "a2"), "", ""]

    def test_low_effort_is_asked_for_where_there_is_no_reasoning(self):
        conversation = Conversation(self.ROW, reasoning_effort="high")
        plain = generations(conversation)
        low = generations(replace(conversation, reasoning_effort="low"))
        mixed = generations(conversation, LossRules(missing_reasoning="low_effort"))
        assert mixed == [plain[0], low[1], low[2]]

    def test_reasoning_earlier_in_the_tool_loop_counts(self):
        for policy in ("low_effort", "mask_channel", "drop"):
            loop = (QUESTION, THOUGHT, CALL, RESULT, ANSWER)
            rules = LossRules(missing_reasoning=policy)
            assert generations(Conversation(loop), rules) == generations(Conversation(loop))

    def test_reasoning_before_another_answer_does_not(self):
        row = (QUESTION, THOUGHT, ANSWER, ANSWER)
        assert learned(row, LossRules(missing_reasoning="drop"))[1] == ""


def test_a_built_in_tools_part_in_the_reasoning_goes_with_it():
    *_, sample = generations(Conversation(FIRST + SECOND))
    history = decode(sample.prompt_ids)
    assert "1+1" not in history and "python" not in history and "t1" not in history
    assert "functions.f" in history and "r1" in history
    (_, after_output, *_) = generations(Conversation(FIRST))
    assert "1+1<|call|><|start|>python to=assistant<|channel|>analysis<|message|>2<|end|>" in decode(
        after_output.prompt_ids
    )
