"""The ready environments: gold answers earn the reward, and held-out problems stay held out."""

from dataclasses import replace
from itertools import islice

import pytest

from tests.environments.layouts import SUITES
from textpolicy.environments import check_env, gold_answers, load, ready_names
from textpolicy.environments.chat import prompt_text
from textpolicy.errors import TaskError
from textpolicy.generation.scripted import ScriptedPolicy
from textpolicy.rewards import score
from textpolicy.rollout.worker import collect

# The rows of public suites come from elsewhere; tests/environments/test_suites.py has them.
NAMES = [name for name in ready_names() if name not in SUITES]


def problem(task):
    """Text that differs between two problems."""
    return str((task.prompt, dict(task.example), task.seed))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_environment_keeps_the_contract(name):
    check_env(load(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_no_held_out_problem_is_ever_trained_on(name):
    environment = load(name)
    heldout = [problem(task) for task in environment.heldout(200)]
    few = {"gsm8k": 2, "letter": 107, "word_count": 188, "wordle": 108}
    assert len(set(heldout)) == len(heldout) == few.get(name, 200)
    trained = {problem(task) for task in islice(environment.stream(0), 1500)}
    assert not set(heldout) & trained


@pytest.mark.parametrize("name", NAMES)
def test_gold_answers_fit_in_the_limit_of_tokens(name, load_tiny):
    environment = load(name)
    _, tokenizer = load_tiny()
    for task in environment.heldout(50):
        answers = gold_answers(environment, task)
        assert max(len(tokenizer.encode(gold)) + 1 for gold in answers) <= environment.max_tokens


@pytest.mark.parametrize("name", NAMES)
def test_gold_answers_earn_the_highest_reward(name, load_tiny):
    environment = load(name)
    _, tokenizer = load_tiny()
    tasks = environment.heldout(20)
    script = [gold_answers(environment, task) for task in tasks]
    groups = collect(
        tasks, ScriptedPolicy(tokenizer, script), environment.reward, group_size=1, seed=0
    )
    rewards = [group.rollouts[0].reward for group in groups]
    # Against an opponent with random moves, a draw is sometimes the best result.
    assert set(rewards) <= ({0.5, 1.0} if name == "tictactoe" else {1.0})


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_of_the_question_never_earns_what_the_right_answer_earns(name):
    environment = load(name)
    for task in environment.heldout(10):
        asked, gold = prompt_text(task.prompt), gold_answers(environment, task)[-1]
        most = score(environment.reward, asked, gold, task.example)
        for copied in {asked, asked.rstrip("=?"), asked.partition("=")[0]}:
            for answer in (copied, f"The answer is {copied}", f"#### {copied}"):
                earned = score(environment.reward, asked, answer, task.example) or 0
                assert earned < most or not most, answer


def test_streams_repeat_by_seed_and_differ_between_seeds():
    environment = load("add")
    first, again, other = (list(islice(environment.stream(seed), 20)) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_a_reward_that_misses_its_gold_answer_fails_the_check():
    environment = load("add")
    with pytest.raises(
        TaskError, match=r"has the reward 0\.0; expected 1\.0, because the completion is the gold"
    ):
        check_env(replace(environment, reward=lambda prompt, completion, example: 0.0))
    message = r"completion '' has the reward 1\.0; expected at most 0\.1, because .* is empty"
    with pytest.raises(TaskError, match=message):
        check_env(replace(environment, reward=lambda prompt, completion, example: 1.0))


def test_an_unknown_environment_names_the_known_and_the_nearest():
    with pytest.raises(TaskError, match=r"known: add, calculator, countdown, .*'countdown'"):
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


# Right answers of a task, and what a model may try: all candidates at once, two answers, a long
# text, and the right answer with more around it.
HOSTILE = {
    "letter": (
        {"letter": "n"},
        {"n": 1.0, " N\n": 1.0, "n.": 0.0, "g, n": 0.0, "abcdefghijklmnopqrstuvwxyz": 0.0},
    ),
    "number_words": (
        {"number": 425},
        {"425": 1.0, "425\n": 1.0, "0425": 0.0, "425 426": 0.0, "4 2 5": 0.0, "٤٢٥": 0.0},
    ),
    "one_word": (
        {"word": "banana"},
        {"banana": 1.0, "Banana": 1.0, "rake, banana, red": 0.0, "banana banana": 0.0},
    ),
    "sum_story": (
        {"calculation": "3 + 8", "result": 11},
        {
            "3 + 8 = 11": 1.0,
            "3 + 8 = 12": 0.3,
            "3 + 8 = ": 0.0,
            "3 + 8 = 9999": 0.0,
            "3 + 8 = 10 = 11": 0.0,
            "3 + 8 = 11 3 - 8 = 5": 0.0,
            "11": 0.0,
        },
    ),
    "json_keys": (
        {"facts": {"job": "baker", "age": 37}},
        {
            '{"job": "baker", "age": 37}': 1.0,
            '{"age": 37,\n "job": "baker"}': 1.0,
            '{"job": "baker", "age": 37.0}': 0.5,
            '{"job": "baker"}': 0.5,
            '{"name": "Femi", "age": 37, "job": "baker", "city": "Oslo"}': 0.5,
            '{"job": "nurse", "job": "baker", "age": 37}': 0.0,
            '[["job", "baker"], ["age", 37]]': 0.0,
            '{"job": "baker", "age": 37} {"job": "nurse", "age": 37}': 0.0,
            '{"job": "baker", "age": 37}' + " " * 999: 0.0,
            "{}": 0.0,
        },
    ),
    "word_count": (
        {"subject": "cat", "first": "My", "words": 5},
        {
            "My cat sleeps all day.": 1.0,
            "The cat sleeps all day.": 0.5,
            "My cat sleeps all.": 0.75,
            "My cat sleeps.": 0.5,
            "My cat cat cat cat.": 0.0,
            "My dog sleeps all day.": 0.0,
            "My cat sleeps all day": 0.0,
            "My cat sleeps. My cat eats.": 0.0,
            "my cat sleeps all day.": 0.0,
            "Write one sentence about a cat in 5 words. Begin with My.": 0.0,
        },
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_only_the_asked_answer_earns_the_whole_reward(name):
    environment = load(name)
    example, answers = HOSTILE[name]
    for answer, value in answers.items():
        assert environment.reward("", answer, example) == value, answer


@pytest.mark.parametrize("name", HOSTILE)
def test_answers_that_would_please_a_careless_reward_earn_nothing(name):
    environment = load(name)
    for task in environment.heldout(20):
        right = gold_answers(environment, task)[0]
        asked = prompt_text(task.prompt)
        for answer in (asked, f"{asked} {right}", f"The answer is {right}.", f"{right} " * 999):
            assert environment.reward(asked, answer, task.example) == 0.0


@pytest.mark.parametrize("name", HOSTILE)
def test_a_solved_example_is_no_task(name):
    environment = load(name)
    *examples, _ = environment.heldout(1)[0].prompt
    solved = {message["content"] for message in examples if message["role"] == "user"}
    drawn = islice(environment.stream(0), 2000)
    assert solved.isdisjoint(task.prompt[-1]["content"] for task in drawn)
    assert solved.isdisjoint(task.prompt[-1]["content"] for task in environment.heldout(200))
