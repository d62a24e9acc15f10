"""Environments of other libraries keep the contract, and never execute text of a model."""

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from textpolicy.environments import check_env, gold_answers, load
from textpolicy.environments.bridges import reasoning_gym as bridge
from textpolicy.environments.faults import verify_or_zero
from textpolicy.errors import TaskError

needs_reasoning_gym = pytest.mark.skipif(
    not find_spec("reasoning_gym"),
    reason="the extra [reasoning-gym] is not installed",
)
needs_textarena = pytest.mark.skipif(
    not find_spec("textarena"),
    reason="the extra [textarena] is not installed",
)
# Each of these tasks makes puzzles for many seconds; `composite` is a mixture of tasks.
SLOW_TASKS = {"composite", "futoshiki", "knight_swap", "puzzle24", "zebra_puzzles"}
GAMES = [
    "Bandit-v0",
    "Blackjack-v0",
    "FrozenLake-v0",
    "GuessTheNumber-v0",
    "LightsOut-v0",
    "Mastermind-v0",
    "TicTacToe-v0",
    "TowerOfHanoi-v0",
]


# A process of its own has no shape checks, which make it many times slower, and no warnings.
CHECK_ALL = """
import sys
from textpolicy.environments import check_env, load

for name in sys.argv[1:]:
    check_env(load(f"reasoning_gym:{name}"), 2)
    print("\\nkept", name)
"""


@pytest.mark.parametrize(
    "every",
    [
        pytest.param(10, marks=pytest.mark.slow, id="each tenth"),
        pytest.param(1, marks=pytest.mark.long, id="all"),
    ],
)
@needs_reasoning_gym
def test_a_hundred_tasks_of_reasoning_gym_keep_the_contract(every):
    from reasoning_gym.factory import DATASETS

    names = sorted(set(DATASETS) - SLOW_TASKS)
    assert len(names) >= 100
    names = names[::every]
    command = [sys.executable, "-W", "ignore", "-c", CHECK_ALL, *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line.split()[1] for line in done.stdout.splitlines() if line[:5] == "kept "] == names


@pytest.mark.slow
@needs_reasoning_gym
def test_every_verifier_that_evaluates_text_is_guarded():
    import reasoning_gym

    root = Path(reasoning_gym.__file__).parent
    evaluates = re.compile(r"(?:\beval|\bparse_expr|\bsympify|\bexec)\((?:\w*answer\w*)\b")
    found = {
        path.stem
        for path in root.rglob("*.py")
        if evaluates.search(path.read_text("utf-8").replace('entry["answer"]', ""))
    }
    assert found == bridge.LITERAL_TASKS | bridge.EXPRESSION_TASKS


@pytest.mark.slow
@needs_reasoning_gym
@pytest.mark.parametrize("name", sorted(bridge.LITERAL_TASKS | bridge.EXPRESSION_TASKS))
def test_an_answer_that_is_code_earns_nothing_and_is_not_executed(name, tmp_path):
    environment = load(f"reasoning_gym:{name}")
    (task,) = islice(environment.stream(0), 1)
    canary = tmp_path / "canary"
    for attack in (
        f"open({str(canary)!r}, 'w')",
        f"__import__('pathlib').Path({str(canary)!r}).touch()",
        "9**9**9",
        "((9**99)**99)**99",
    ):
        assert environment.reward(task.prompt, attack, task.example) == 0.0
    assert not canary.exists()
    (gold,) = gold_answers(environment, task)
    tagged = f"I think <answer>1</answer>, no: <answer>{gold}</answer>"
    assert environment.reward(task.prompt, tagged, task.example) == 1.0


@pytest.mark.parametrize(
    ("answer", "name", "harmless"),
    [
        ("[[0, 1], [1, 0]]", "binary_matrix", True),
        ("[open('x')]", "binary_matrix", False),
        ("x**2/2 + sin(x) + C", "simple_integration", True),
        ("x.__class__", "simple_integration", False),
        ("factorial(999999)", "simple_integration", False),
        ("9**9**9", "puzzle24", False),
        ("9**(9**9)", "puzzle24", False),
        ("exp(exp(99))", "puzzle24", False),
        ("((9**99)**99)**99", "puzzle24", False),
        ("2**-1 * x^(1/2)", "simple_integration", True),
        ("(1+2)*8", "puzzle24", True),
        ("1" * 301, "countdown", False),
        ("anything at all: open('x')", "word_sorting", True),
    ],
)
def test_an_answer_reaches_a_verifier_only_if_it_is_safe(answer, name, harmless):
    assert bridge.is_safe_to_verify(answer, name) is harmless


def test_an_answer_that_a_verifier_cannot_read_earns_nothing():
    assert verify_or_zero(lambda answer, example: int(answer), "x", {}) == 0.0
    assert verify_or_zero(lambda answer, example: int(answer) / 2, "1", {}) == 0.5


@needs_reasoning_gym
@pytest.mark.slow
def test_an_unknown_task_is_an_error_with_the_nearest_names():
    with pytest.raises(
        TaskError, match=r"no single task 'basic_arithmetik'.*nearest names.*'basic_arithmetic'"
    ):
        load("reasoning_gym:basic_arithmetik")


@pytest.mark.slow
@needs_textarena
@pytest.mark.parametrize("game", GAMES)
def test_a_game_of_textarena_keeps_the_contract(game):
    check_env(load(f"textarena:{game}"), 3)


@pytest.mark.slow
@needs_textarena
def test_a_hidden_number_that_is_held_out_is_never_trained_on():
    environment = load("textarena:GuessTheNumber-v0")

    def hidden(tasks):
        numbers = set()
        for task in tasks:
            env = task.env()
            _, info = env.reset(seed=task.seed)
            numbers.add(json.loads(info["problem"])["game_number"])
        return numbers

    held_out = hidden(environment.heldout(50))
    trained = hidden(islice(environment.stream(0), 300))
    assert (len(held_out), len(trained)) == (5, 15)
    assert not held_out & trained
    assert "has one problem" in load("textarena:TicTacToe-v0").split_note


@pytest.mark.slow
@needs_textarena
def test_games_neither_use_nor_change_other_random_states():
    moves = [f"[{cell}]" for cell in (4, 0, 8, 2, 6, 1, 3, 5, 7)]

    def play(beside):
        env, other = (load("textarena:TicTacToe-v0").make() for _ in range(2))
        seen = [env.reset(seed=5)[0]]
        for move in moves:
            if beside:
                other.reset(seed=1)
            text, _, over, _, _ = env.step(move)
            seen.append(text)
            if over:
                return seen
        return seen

    before = np.random.get_state()[1].tolist()
    alone = play(beside=False)
    assert alone == play(beside=True)
    assert before == np.random.get_state()[1].tolist()


@pytest.mark.slow
@needs_textarena
def test_an_observation_has_only_new_text_and_not_the_own_move():
    env = load("textarena:GuessTheNumber-v0").make()
    first, _ = env.reset(seed=0)
    second, *_ = env.step("[5]")
    assert "Guess The Number" in first
    assert "Guess The Number" not in second
    assert "[5]" not in second
    assert re.search("higher|lower", second)
