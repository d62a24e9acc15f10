"""Rewards are loaded by file and name, called in order, and must return finite numbers."""

import asyncio
import functools
import math
import pickle
from contextlib import closing
from fractions import Fraction
from importlib import import_module

import numpy as np
import pytest

import textpolicy as tp
from tests.rewards.scoring_calls import score_all
from textpolicy.errors import ConfigError, RewardError
from textpolicy.generation.mlx_generation import create_policy
from textpolicy.rewards import (
    Reward,
    Rewards,
    Score,
    Scorer,
    load_reward,
    reward,
    sample_of,
    score,
)
from textpolicy.rewards.load_reward import READY_REWARDS
from textpolicy.rollout.worker import collect
from textpolicy.tracking.rollout_metrics import rollout_metrics
from textpolicy.types import Task


def test_a_function_in_a_file_is_found_by_name(write_rewards):
    path = write_rewards("def good(prompt, completion, example):\n    return example['x'] + 0.5\n")
    assert score(load_reward(f"{path}:good"), "p", "c", {"x": 1}) == 1.5


@pytest.mark.parametrize(
    "value",
    [
        float("nan"),
        math.inf,
        "1.0",
        [1.0],
        1 + 2j,
        np.float32("nan"),
        np.complex64(1),
        np.ones(1),
        10**400,
        -(10**5000),
    ],
    ids=lambda value: str(value)[:9] if not isinstance(value, int) else "beyond a float",
)
def test_an_answer_that_is_not_a_finite_number_is_refused_with_its_sample(value):
    def odd(prompt, completion, example):
        return value

    with pytest.raises(RewardError, match=r"reward odd returned .* finite number") as caught:
        score(odd, "the prompt", "the completion", {})
    assert "on prompt 'the prompt', completion 'the completion'" in str(caught.value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (True, 1.0),
        (3, 3.0),
        (None, None),
        (-0.5, -0.5),
        (Fraction(1, 4), 0.25),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3.0),
        (np.bool_(True), 1.0),
    ],
)
def test_numbers_booleans_and_none_are_rewards_and_come_back_as_floats(value, expected):
    scored = score(lambda prompt, completion, example: value, "p", "c", {})
    assert scored == expected and type(scored) is type(expected)


def test_an_exception_in_a_reward_names_function_line_and_sample(write_rewards):
    path = write_rewards("def bad(prompt, completion, example):\n    return example['missing']\n")
    with pytest.raises(RewardError, match=r"reward bad raised KeyError: 'missing' \(.*line 2\)"):
        score(load_reward(f"{path}:bad"), "p", "c", {})


@pytest.mark.parametrize("batched", [False, True])
def test_a_column_that_is_looked_for_in_kwargs_is_a_parameter_here(batched):
    def right(completion, **kwargs):
        return float(completion == kwargs["answer"])

    def all_right(completions, **kwargs):
        return [right(one, **kwargs) for one in completions]

    function = reward(batched=True)(all_right) if batched else right
    with pytest.raises(RewardError, match="KeyError: 'answer'") as caught:
        score(function, "p", "c", {"answer": "2"})
    name = "all_right" if batched else "right"
    assert str(caught.value).endswith(f"write `answer` among the parameters of {name}")


def test_a_list_from_a_reward_for_one_sample_is_told_of_the_decorator():
    def right(prompts, completions, answer):
        return [float(one == "2") for one in completions]

    with pytest.raises(RewardError, match=r"returned \[0.0, 0.0\]") as caught:
        score(right, "p", "cc", {"answer": "2"})
    assert "@tp.reward(batched=True) above it" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("completion_ids", "`tokens` holds the sampled token ids"),
        ("prompt_ids", "no parameter holds the prompt's token ids"),
        ("prompts", "@tp.reward(batched=True)"),
        ("trainer_state", "leave the parameter out"),
        ("log_metric", "return tp.Score("),
        ("log_extra", "return tp.Score("),
        ("info", "`example` is the whole row"),
        ("state", "`messages` is the conversation"),
    ],
)
def test_a_parameter_of_another_library_is_answered_with_what_replaces_it(name, words):
    spaces = {}
    exec(f"def right(completion, {name}): return 0.0", spaces)
    with pytest.raises(ConfigError, match=f"asks for `{name}`") as caught:
        Reward(spaces["right"], "right").check_columns(["answer"])
    assert words in str(caught.value) and "--columns" not in str(caught.value)
    Reward(spaces["right"], "right").check_columns(["answer", name])
    with pytest.raises(RewardError, match="KeyError") as caught:
        score(lambda completion, **kwargs: kwargs[name], "p", "c", {})
    assert words in str(caught.value)


def test_the_combination_of_a_file_is_its_reward(write_rewards):
    source = (
        "import textpolicy as tp\n"
        "def one(completion): return 1.0\n"
        "def other(completion): return 2.0\n"
        "both = tp.Rewards([one, other], weights=[1.0, 0.5])\n"
    )
    assert score(load_reward(write_rewards(source)), "p", "c", {}) == 2.0
    path = write_rewards(source + "single = tp.Rewards([one])\n")
    with pytest.raises(ConfigError, match=r"2 combinations \(both, single\).*:both"):
        load_reward(path)


def test_long_samples_are_cut_in_messages():
    with pytest.raises(RewardError) as caught:
        score(lambda p, c, e: "no", "p" * 5000, "c" * 5000, {})
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("source", "name", "error", "message"),
    [
        ("x = 1", "score", ConfigError, "has no 'score'; its functions: none"),
        ("def scor(p, c, e): ...", "score", ConfigError, "Did you mean 'scor'"),
        ("score = 3", "score", ConfigError, "is int; expected a function"),
        ("def score(prompt): ...", "score", ConfigError, r"expected \(prompt, completion"),
        ("\n1 / 0", "score", RewardError, "raised ZeroDivisionError.*line 2"),
        ("import sys\nsys.exit(0)", "score", RewardError, "raised SystemExit: 0.*line 2"),
        ("def (", "score", RewardError, "raised SyntaxError"),
    ],
)
def test_a_wrong_reward_file_says_what_is_wrong(write_rewards, source, name, error, message):
    with pytest.raises(error, match=message):
        load_reward(f"{write_rewards(source)}:{name}")


@pytest.mark.parametrize("name", READY_REWARDS)
def test_a_ready_reward_compares_the_answer_after_the_thought_with_the_column(name):
    # A reward with a timeout is sent to another process.
    ready = pickle.loads(pickle.dumps(load_reward(name)))
    right, wrong = ("B", "C") if name == "choice_match" else ("4", "5")
    assert score(ready, "p", f"<think>{wrong}</think> {right}", {"answer": right}) == 1
    assert score(ready, "p", f"<think>{right}</think> {wrong}", {"answer": right}) == 0
    with pytest.raises(ConfigError, match=f"{name} asks for `answer`.*--columns answer=COLUMN"):
        score(ready, "p", right, {"gold": right})


def test_a_missing_file_and_a_text_that_names_no_file_are_errors(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        load_reward(f"{tmp_path}/none.py:score")
    with pytest.raises(
        ConfigError, match=r"expected FILE\.py, FILE\.py:FUNCTION, or a ready reward: exact_match"
    ):
        load_reward("mine:score")


def call(function, completion="c", /, **row):
    return score(function, "p", completion, row)


def test_arguments_are_filled_by_name_from_the_row_and_the_context():
    def close(completion, answer, stop_reason, unit="cm"):
        return len(completion) * answer + (stop_reason == "length") + len(unit) / 10

    assert call(close, "ab", answer=3) == 6.2
    assert call(close, "ab", answer=3, unit="miles") == 6.5
    assert score(close, "p", "ab", {"answer": 3}, stop_reason="length") == 7.2


def test_three_parameters_of_any_other_names_are_filled_by_position():
    assert call(lambda p, c, e: len(p + c) + e["x"], x=1) == 3
    assert call(lambda p, c, e, **context: len(context["turns"]), x=1) == 1
    assert call(lambda p, c, /, example: len(c) + example["x"], x=1) == 2


def test_keyword_context_holds_all_context_fields():
    seen = {}

    def look(completion, **context):
        seen.update(context)

    call(look, "hi", answer=1)
    assert seen == {
        "tokens": list(b"hi"),
        "stop_reason": "stop_token",
        "messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "hi"}],
        "turns": ["hi"],
        "turn_rewards": [0.0],
        "thought": "",
        "visible_answer": "hi",
        "in_thought": False,
    }


def test_a_context_field_hides_a_column_of_the_same_name():
    assert call(lambda completion, turns, example: len(turns) + example["turns"], turns=5) == 6


def test_columns_that_the_rows_lack_are_named_before_a_function_is_called():
    def close(completion, answer):
        raise AssertionError("never called")

    with pytest.raises(ConfigError) as caught:
        call(close, question="?", solution="!")
    message = str(caught.value)
    assert message.startswith(
        "your reward close asks for `answer`; the rows have `question`, `solution`."
    )
    assert "ask for `example`" in message
    with pytest.raises(ConfigError, match="Did you mean `answers`"):
        call(close, answers=[1])
    with pytest.raises(ConfigError, match=r"the rows have `result`\. Rename"):
        call(lambda completion, solution: 1.0, result=1)


@pytest.mark.parametrize(
    "function",
    [lambda prompt: 1.0, lambda: 1.0, lambda p, c: 1.0, lambda p, c, e, f: 1.0, lambda *, x: 1.0],
)
def test_a_function_that_would_not_see_the_completion_is_refused(function):
    with pytest.raises(ConfigError, match=r"it would not see the completion; expected \(prompt"):
        Rewards(function)


def test_a_function_of_lists_is_told_how_to_take_them():
    def as_in_trl(completions, answer, **kwargs):
        return [float(one == right) for one, right in zip(completions, answer, strict=True)]

    with pytest.raises(ConfigError, match=r"write @tp.reward\(batched=True\) above it"):
        call(as_in_trl, answer="1")


def test_async_rewards_are_awaited_sixteen_at_a_time():
    running, most = 0, 0

    async def slow(completion):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001)
        running -= 1
        return float(completion)

    verdicts = score_all(slow, *map(str, range(50)))
    assert [verdict.value for verdict in verdicts] == list(range(50))
    assert most == 16


def test_a_partial_of_an_async_reward_is_awaited():
    async def scaled(completion, factor):
        return factor * len(completion)

    assert call(functools.partial(scaled, factor=2.0), "abc") == 6.0


def test_async_rewards_run_inside_the_event_loop_of_a_notebook_too():
    async def half(completion):
        return 0.5

    async def notebook():
        return call(half)

    assert asyncio.run(notebook()) == 0.5


def test_batched_rewards_get_lists_and_are_called_once():
    calls = []

    @reward(batched=True)
    def longest(prompts, completions, examples, answer, stop_reason, missing=None):
        calls.append((prompts, answer, stop_reason, missing))
        return np.array([len(text) for text in completions])

    samples = [sample_of("p", "a" * n, {"answer": n}) for n in (1, 2, 3)]
    with closing(Scorer(Rewards(longest))) as scorer:
        values = [verdict.value for verdict in scorer.score(samples)]
    assert values == [1.0, 2.0, 3.0]
    assert calls == [(["p"] * 3, [1, 2, 3], ["stop_token"] * 3, None)]


def test_a_batched_async_reward_is_awaited():
    @reward(batched=True)
    async def both(completions):
        return [1.0 for _ in completions]

    assert [verdict.value for verdict in score_all(both, "a", "b")] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("answer", "got"),
    [
        ([1.0], "1 values"),
        (1.0, r"1\.0 \(float\)"),
        (None, r"None \(NoneType\)"),
        ("ab", "'ab'"),
        ({"a": 1, "b": 2}, "dict"),
        (iter([1.0, 2.0]), "list_iterator"),
    ],
)
def test_a_batched_reward_must_return_a_list_with_one_value_for_each_sample(answer, got):
    @reward(batched=True)
    def odd(completions):
        return answer

    with pytest.raises(RewardError, match=f"reward odd returned .*{got}.* 2 samples"):
        score_all(odd, "a", "b")


def test_several_rewards_add_up_by_weight_and_each_part_is_kept():
    def right(completion):
        return float(completion == "yes")

    def brief(completion):
        return Score(1 / len(completion), {"length": len(completion)})

    rewards = Rewards([right, brief], weights=[1, 0.5])
    good, bad = score_all(rewards, "yes", "nope")
    assert good.parts == {"right": 1.0, "brief": pytest.approx(1 / 3)}
    assert good.value == pytest.approx(1 + 0.5 / 3) and bad.value == pytest.approx(0.125)
    assert good.metrics == {"brief/length": 3.0}


def test_none_is_left_out_of_the_sum_and_a_sample_with_none_from_all_has_no_reward():
    def right(completion):
        return 1.0 if completion == "yes" else None

    def shouted(completion):
        return Score(None, {"heard": 1}) if completion == "?" else float(completion.isupper())

    yes, other, neither = score_all(Rewards([right, shouted], weights=[3, 1]), "yes", "NO", "?")
    assert (yes.value, yes.parts) == (3.0, {"right": 1.0, "shouted": 0.0})
    assert (other.value, other.parts) == (1.0, {"shouted": 1.0})
    assert (neither.value, neither.parts, neither.error) == (None, {}, None)
    assert neither.metrics == {"shouted/heard": 1.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"functions": []}, "there is no reward function; expected at least one"),
        (
            {"functions": [max, max]},
            "two rewards are called builtin_function_or_method; expected different names",
        ),
        ({"weights": [1, 2]}, "a finite number for each of 1"),
        ({"weights": [float("nan")]}, "a finite number for each of 1"),
        ({"timeout": 0}, "timeout is 0; expected seconds above 0"),
        ({"on_error": "ignore"}, "on_error is 'ignore'; expected"),
        ({"on_error": float("nan")}, "on_error is nan; expected"),
        ({"max_error_rate": 2}, "max_error_rate is 2; expected a number from 0 to 1"),
        ({"workers": 0}, "workers is 0; expected at least 1"),
        ({"memory_gb": 1}, "memory_gb is set without a timeout; expected a timeout too"),
        ({"timeout": 1, "memory_gb": 0}, "memory_gb is 0; expected more than 0"),
    ],
    ids=str,
)
def test_rewards_with_impossible_options_are_refused(options, message):
    def fine(completion):
        return 1.0

    with pytest.raises(ConfigError, match=message):
        Rewards(**{"functions": fine} | options)


def test_a_decorated_function_is_still_callable_and_may_have_another_name():
    @reward(name="lengths", batched=True)
    def f(completions):
        return [len(text) for text in completions]

    @reward
    def g(completion):
        return 1.0

    assert f(completions=["a"]) == [1] and (f.name, f.batched) == ("lengths", True)
    assert g("a") == 1.0 and (g.name, g.batched) == ("g", False)


def test_a_file_with_one_function_needs_no_name(write_rewards):
    source = "import math\nfrom os.path import join\ndef _aid(x): ...\ndef mine(completion):\n"
    assert call(load_reward(write_rewards(source + "    return 0.5\n"))) == 0.5
    with pytest.raises(ConfigError, match=r"holds 2 functions \(a, b\); expected one.*py:a"):
        load_reward(write_rewards("def a(completion): ...\ndef b(completion): ...\n"))
    with pytest.raises(ConfigError, match=r"holds 0 functions \(none\)"):
        load_reward(write_rewards("x = 1\n"))


def test_a_file_may_hold_a_weighted_sum_of_rewards(write_rewards):
    path = write_rewards(
        "import textpolicy as tp\n"
        "def a(completion):\n    return 1.0\n"
        "def b(completion):\n    return 2.0\n"
        "both = tp.Rewards([a, b], weights=[1, 0.5])\n"
    )
    (verdict,) = score_all(load_reward(f"{path}:both"), "c")
    assert verdict.value == 2.0


def test_an_error_with_a_broken_or_endless_message_is_reported():
    class Rude(Exception):
        def __str__(self):
            raise ValueError

    def rude(completion):
        raise Rude

    def endless(completion):
        raise ValueError("x" * 10**7)

    with pytest.raises(RewardError, match="rude raised Rude: <its message cannot be shown>"):
        call(rude)
    with pytest.raises(RewardError) as caught:
        call(endless)
    assert len(str(caught.value)) < 2000


def test_special_tokens_reach_no_reward(load_tiny):
    model, tokenizer = load_tiny()
    seen = []

    def look(completion, tokens, turns, messages, stop_reason):
        seen.append((completion, turns, messages, tokens, stop_reason))
        return 1.0

    policy = create_policy(model, tokenizer, {"max_tokens": 6, "temperature": 0})
    (group,) = collect([Task(id="t", prompt="347+185=")], policy, look, group_size=1, seed=0)
    (completion, turns, messages, tokens, stop_reason) = seen[0]
    assert stop_reason == "stop_token" and tokens[-1] in tokenizer.eos_token_ids
    assert completion == turns[0] == messages[-1]["content"] == tokenizer.decode(tokens[:-1])
    assert group.rollouts[0].tokens[-len(tokens) :] == tokens


def test_rollouts_carry_the_parts_the_metrics_and_the_errors_of_their_rewards(load_tiny):
    model, tokenizer = load_tiny()

    def picky(completion, example):
        if example["bad"]:
            raise ValueError("bad row")
        return Score(1.0, {"seen": 2.0})

    def brief(completion):
        return 0.5

    policy = create_policy(model, tokenizer, {"max_tokens": 2})
    tasks = [Task(id=f"t{n}", prompt="1+1=", example={"bad": n}) for n in (0, 1)]
    rewards = Rewards([picky, brief], weights=[1, 2], on_error="skip")
    good, bad = collect(tasks, policy, rewards, group_size=1, seed=0)
    assert good.rollouts[0].reward == 2.0
    assert good.rollouts[0].rewards == {"picky": 1.0, "brief": 0.5}
    assert good.rollouts[0].metrics == {"rewards/picky/seen": 2.0}
    assert bad.rollouts[0].reward is None
    assert "picky raised ValueError: bad row" in bad.rollouts[0].error
    assert "on task t1, prompt '1+1='" in bad.rollouts[0].error
    metrics = rollout_metrics([good, bad])
    assert metrics["reward/errors"] == metrics["reward/unscored"] == 0.5
    assert metrics["rewards/brief/mean"] == 0.5 and metrics["rewards/brief/std"] == 0.0
    assert metrics["rewards/picky/seen"] == 2.0


def test_the_packages_of_the_reference_need_no_import_of_their_own():
    # Another test may have imported them, so the first use is asked for by itself.
    for name in ("adapters", "algorithms", "environments", "rewards", "training"):
        assert tp.__getattr__(name) is import_module(f"textpolicy.{name}")
    assert tp.rewards.score is score
