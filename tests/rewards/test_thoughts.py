"""Thought and visible answer of a completion: how they are told apart, and who receives them."""

import pytest

import textpolicy as tp
from textpolicy.errors import ConfigError
from textpolicy.rewards import Scorer, as_rewards, sample_of, score
from textpolicy.rewards.thoughts import split_thought
from textpolicy.rewards.verifiers import (
    choice_match,
    code_share,
    exact_match,
    final_answer,
    has_layout,
    json_match,
    last_number,
    length_score,
    math_equal,
    normalised_match,
    number_equal,
    pattern_match,
    set_match,
    set_overlap,
    tag_share,
    tagged,
)


@pytest.mark.parametrize(
    "text, opened, thought, answer",
    [
        ("4", False, "", "4"),
        (" 4\n", False, "", " 4\n"),
        ("", False, "", ""),
        ("<think>2+2</think>\n\n4\n", False, "2+2", "4"),
        ("2+2</think>\n4", True, "2+2", "4"),
        ("2+2</think>\n4", False, "2+2", "4"),
        ("<think>\n\n</think>\n\n4", False, "", "4"),
        ("<think>2+2 is 4", False, "2+2 is 4", ""),
        ("2+2 is 4", True, "2+2 is 4", ""),
        ("", True, "", ""),
        ("<think>a</think>b<think>c</think>d", False, "a</think>b<think>c", "d"),
        ("<think>a</think> 4 <think>or 5", False, "a</think> 4 <think>or 5", ""),
        ("4 <think>or 5", False, "4 <think>or 5", ""),
        ("<think>a</think>", False, "a", ""),
    ],
)
def test_the_answer_is_what_follows_the_last_closed_thought(text, opened, thought, answer):
    assert split_thought(text, in_thought=opened) == (thought, answer)


def test_a_model_may_have_other_marks():
    marks = ("<|think:start|>", "<|think:end|>")
    assert split_thought("<|think:start|>a<|think:end|>b", marks=marks) == ("a", "b")


UNCLOSED = '<think>the answer is 4, so \\boxed{4} (B) ```python\nx = 4\n``` {"a": 4} 4'


@pytest.mark.parametrize(
    "verifier",
    [
        lambda text: math_equal(text, "4"),
        lambda text: number_equal(text, 4),
        lambda text: exact_match(text, "4"),
        lambda text: normalised_match(text, "4"),
        lambda text: choice_match(text, "B"),
        lambda text: set_match(text, "4"),
        lambda text: set_overlap(text, "4"),
        lambda text: json_match(text, {"type": "object"}),
        lambda text: pattern_match(text, "4"),
        lambda text: length_score(text, 1, 100),
        lambda text: final_answer(text),
        lambda text: last_number(text),
        lambda text: tagged(text, "answer"),
        lambda text: has_layout(text, ["answer"]),
        lambda text: code_share(text, ["assert x == 4"], unsafe=True),
    ],
)
def test_every_verifier_scores_an_unclosed_thought_as_no_answer(verifier):
    _, answer = split_thought(UNCLOSED)
    assert not verifier(answer)


def test_formats_know_a_tag_that_the_prompt_has_opened():
    inside = "hm</think><answer>4</answer>"
    assert has_layout(inside, in_thought=True) and not has_layout(inside)
    assert tag_share(inside, in_thought=True) == 1 and tag_share(inside) == 0.75
    whole = f"<think>{inside}"
    assert has_layout(whole) and not has_layout(whole, in_thought=True)
    assert tag_share(whole, in_thought=True) == 0.75


def call(function, completion, /, **row):
    return score(function, "p", completion, row)


def test_a_reward_receives_thought_and_answer_beside_the_completion():
    seen = []

    def look(completion, thought, answer, visible_answer, in_thought, gold):
        seen.append((completion, thought, answer, visible_answer, in_thought))
        return 0.0

    call(look, "<think>a</think> 4", gold="4")
    assert seen == [("<think>a</think> 4", "a", "4", "4", False)]


def test_a_column_with_the_name_answer_stays_the_column():
    def right(visible_answer, answer):
        return float(visible_answer == answer)

    assert call(right, "<think>4</think>5", answer="5") == 1
    assert call(right, "<think>5</think>4", answer="5") == 0
    assert call(right, "<think>5", answer="5") == 0
    assert call(lambda completion, answer=None: float(answer is None), "4") == 1


def test_a_reward_that_would_compare_the_model_with_itself_is_refused():
    def close(completion, answer):
        raise AssertionError("never called")

    with pytest.raises(ConfigError, match="asks for `answer`; the rows have `solution`"):
        call(close, "4", solution="4")

    def asking(prompt, completion, answer):
        raise AssertionError("never called")

    # Neither parameter receives the column of its name, so nothing of the row is read.
    with pytest.raises(ConfigError, match="asks for `answer`; the rows have `completion`, `prompt"):
        call(asking, "4", prompt="2+2=", completion="5")

    def graded(answer):
        raise AssertionError("never called")

    with pytest.raises(ConfigError, match="would not see the completion: the rows have a column"):
        call(graded, "4", answer="4")
    assert call(lambda answer: float(len(answer)), "<think>a</think>12345", solution="4") == 5
    assert call(lambda p, c, answer: len(c) + answer["answer"], "ab", answer=3) == 5


def test_a_batched_reward_receives_lists():
    @tp.reward(batched=True)
    def lengths(visible_answer, thought, in_thought):
        return [len(a) + 10 * len(t) for a, t in zip(visible_answer, thought, strict=True)]

    samples = [sample_of("p", text, {}) for text in ("<think>ab</think>c", "cd")]
    scorer = Scorer(as_rewards(lengths))
    assert [verdict.value for verdict in scorer.score(samples)] == [21, 2]


def test_the_check_gives_a_reward_the_thoughts_of_sampled_completions():
    from textpolicy.types import Completion, Sampling, StopReason

    def completion(text):
        return Completion(
            prompt_tokens=[1],
            tokens=[1],
            logprobs=[0.0],
            text=text,
            stop_reason=StopReason.LENGTH,
            sampling=Sampling(),
            version=0,
            in_thought=True,
        )

    def right(visible_answer, gold):
        return float(visible_answer == gold)

    rows = [{"prompt": "1+1=", "gold": "2"}, {"prompt": "2+2=", "gold": "4"}]
    groups = [[completion("2"), completion("so</think>2")], [completion("4"), completion("4")]]
    check = tp.check_reward(right, rows, sample=lambda prompts: groups)
    signal = next(one for one in check.findings if one.name == "signal")
    assert "differ inside 1 of 2 groups of 2 completions; mean reward 0.25" in signal.detail
