"""The ready tasks: gold scores, nothing else does, and held-out problems stay held out."""

from dataclasses import replace
from itertools import islice

import pytest

from textpolicy.environments import check_env, load
from textpolicy.errors import TaskError

NAMES = ["add", "countdown", "reverse", "sort"]


@pytest.mark.parametrize("name", NAMES)
def test_the_module_keeps_its_contract(name):
    check_env(load(name))


@pytest.mark.parametrize("name", NAMES)
def test_no_held_out_problem_is_ever_trained_on(name):
    environment = load(name)
    heldout = {task.prompt for task in environment.heldout(512)}
    assert len(heldout) == 512
    trained = {task.prompt for task in islice(environment.stream(0), 5000)}
    assert not heldout & trained


@pytest.mark.parametrize("name", NAMES)
def test_gold_answers_fit_in_the_tokens_they_are_given(name, load_tiny):
    environment = load(name)
    _, tokenizer = load_tiny()
    for task in environment.heldout(100):
        gold = environment.gold(task.example)
        assert len(tokenizer.encode(gold)) + 1 <= environment.max_tokens


def test_streams_repeat_by_seed_and_differ_between_seeds():
    environment = load("add")
    first, again, other = (list(islice(environment.stream(seed), 20)) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_a_reward_that_misses_its_gold_answer_fails_the_check():
    environment = load("add")
    with pytest.raises(TaskError, match=r"scores 0\.0 for .* \(the gold answer\)"):
        check_env(replace(environment, reward=lambda prompt, completion, example: 0.0))
    with pytest.raises(TaskError, match=r"scores 1\.0 for ''; expected 0\.0"):
        check_env(replace(environment, reward=lambda prompt, completion, example: 1.0))


def test_an_unknown_environment_names_the_known_and_the_nearest():
    with pytest.raises(TaskError, match=r"known: add, countdown, reverse, sort.*'countdown'"):
        load("countdwon")


@pytest.mark.parametrize(
    ("completion", "value"),
    [
        ("3*5-2", 1.0),
        ("(3*5)-2", 1.0),
        ("5*3-2", 1.0),
        ("3*5-2=13", 0.0),
        ("13", 0.0),
        ("3*5-2+0", 0.0),
        ("3*5-2-2+2", 0.0),
        ("3/(5-5)", 0.0),
        ("__import__('os')", 0.0),
        ("3 5", 0.0),
        ("-(2)", 0.0),
        ("((((3*5-2", 0.0),
    ],
)
def test_countdown_accepts_expressions_that_use_each_number_once(completion, value):
    environment = load("countdown")
    example = {"numbers": [2, 3, 5], "target": 13}
    assert environment.reward("make 13 from 2 3 5", completion, example) == value
