"""Held-out problems of Gymnasium environments are never trained on, and few problems are said."""

import time
import warnings
from itertools import islice
from threading import Lock
from types import ModuleType

import gymnasium as gym
import pytest

import textpolicy as tp
from textpolicy.cli import main
from textpolicy.config import TrainConfig
from textpolicy.config.settings import changed
from textpolicy.environments import AnyText, check_env, from_gymnasium, load
from textpolicy.environments.held_out import is_held_out
from textpolicy.environments.load import environment_from_module
from textpolicy.errors import TaskError
from textpolicy.rollout.task_source import TaskSource


class Numbers(gym.Env):
    """Asks for one of `count` numbers to be repeated. A subclass sets `count`."""

    observation_space = AnyText()
    action_space = AnyText()
    count = 16

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.number = str(int(self.np_random.integers(self.count)))
        return f"say {self.number}", {"gold": self.number}

    def step(self, action):
        return "", float(action == self.number), True, False, {}


class TwoProblems(Numbers):
    count = 2


class ManyProblems(Numbers):
    count = 10**6


class Hidden(Numbers):
    """Starts every episode with the same text; `info["problem"]` tells the problems apart."""

    def reset(self, *, seed=None, options=None):
        _, info = super().reset(seed=seed, options=options)
        return "guess", info | {"problem": self.number}


class Undeclared(Numbers):
    """Starts every episode with the same text, and says nothing of what differs."""

    def reset(self, *, seed=None, options=None):
        return "guess", super().reset(seed=seed, options=options)[1]


class Skewed(Numbers):
    """Has one problem that nearly every seed draws."""

    def reset(self, *, seed=None, options=None):
        _, info = super().reset(seed=seed, options=options)
        self.number = self.number if self.number == "3" else "0"
        return f"say {self.number}", info


def problems(tasks, env=None):
    if env is Hidden:
        return {env_of(task, env).number for task in tasks}
    return {task.prompt for task in tasks}


def env_of(task, env):
    made = env()
    made.reset(seed=task.seed)
    return made


@pytest.mark.parametrize(
    ("env", "held_out"), [(Numbers, 4), (TwoProblems, 1), (Hidden, 4), (Skewed, 1)]
)
def test_no_held_out_problem_is_ever_trained_on(env, held_out):
    environment = from_gymnasium(env)
    chosen = problems(environment.heldout(64), env)
    assert len(chosen) == held_out
    for seed in range(3):
        assert not chosen & problems(islice(environment.stream(seed), 300), env)


def test_tic_tac_toe_trains_on_no_held_out_opening():
    environment = load("tictactoe")
    held_out = problems(environment.heldout(64))
    trained = problems(islice(environment.stream(0), 500))
    assert not held_out & trained
    # The empty board is half of all openings, so it stays in training.
    assert (len(held_out), len(trained)) == (2, 8)
    assert "tictactoe has few problems: 128 draws gave 10 different ones" in environment.split_note
    assert (
        "2 of the 10 are held out and never trained on, so the held-out score measures only 2"
        in environment.split_note
    )


def test_each_held_out_problem_comes_first_and_then_more_seeds_of_it():
    tasks = from_gymnasium(Numbers).heldout(12)
    assert len({task.prompt for task in tasks[:4]}) == len({task.prompt for task in tasks}) == 4
    assert len({task.seed for task in tasks}) == 12
    assert from_gymnasium(Numbers).heldout(3) == tasks[:3]


def test_the_most_frequent_problem_stays_in_training():
    environment = from_gymnasium(Skewed)
    assert problems(environment.heldout(9)) == {"say 3"}
    assert problems(islice(environment.stream(0), 99)) == {"say 0"}


def test_a_single_problem_is_split_by_seeds_and_said():
    environment = from_gymnasium(Undeclared)
    held_out = {task.seed for task in environment.heldout(50)}
    assert len(held_out) == 50
    assert not held_out & {task.seed for task in islice(environment.stream(0), 500)}
    note = environment.split_note
    assert "Undeclared has one problem: 128 draws gave the same one" in note
    assert "their score says nothing about new problems" in note
    assert 'return info["problem"] from reset' in note


def test_many_problems_are_split_by_their_hashes_and_need_no_note():
    environment = from_gymnasium(ManyProblems)
    assert environment.split_note == load("add").split_note == ""
    assert all(is_held_out(task.prompt) for task in environment.heldout(50))
    trained = list(islice(environment.stream(0), 100))
    assert not any(is_held_out(task.prompt) for task in trained)
    assert len(problems(environment.heldout(50))) == 50
    assert trained == list(islice(from_gymnasium(ManyProblems).stream(0), 100))


def drawn(prompts, problem=""):
    """Return the environment of a file that draws one of these prompts."""
    module = ModuleType("few")
    exec(
        f"def make(rng): return rng.choice({prompts}), {{'n': rng.randrange(3)}}\n"
        f"def reward(prompt, completion, example): return 1.0\n{problem}",
        vars(module),
    )
    return environment_from_module(module, "few")


@pytest.mark.parametrize("count", [2, 3, 5, 20])
def test_an_environment_that_draws_few_prompts_holds_some_of_them_out(count):
    prompts = [f"question {number}" for number in range(count)]
    environment = drawn(prompts)
    held_out = problems(environment.heldout(50))
    assert len(held_out) == max(1, count // 4)
    assert problems(islice(environment.stream(0), 500)) == set(prompts) - held_out
    assert f"few has few problems: 128 draws gave {count} different" in environment.split_note
    assert environment.heldout(1)


def test_an_environment_with_one_prompt_trains_on_it_and_says_so():
    environment = drawn(["write a haiku"])
    assert [task.prompt for task in environment.heldout(50)] == ["write a haiku"]
    assert problems(islice(environment.stream(0), 9)) == {"write a haiku"}
    assert "write a function problem(example)" in environment.split_note
    told_apart = drawn(["guess"], "def problem(example): return str(example['n'])")
    chosen = {task.example["n"] for task in told_apart.heldout(50)}
    assert len(chosen) == 1
    assert not chosen & {task.example["n"] for task in islice(told_apart.stream(0), 99)}
    assert "128 draws gave 3 different" in told_apart.split_note


@pytest.mark.parametrize("env", [Numbers, Undeclared, ManyProblems])
def test_the_split_needs_few_resets(env):
    resets = []

    class Counted(env):
        def reset(self, *, seed=None, options=None):
            resets.append(seed)
            return super().reset(seed=seed, options=options)

    environment = from_gymnasium(Counted)
    next(environment.stream(0))
    assert len(resets) <= 128 + 10
    list(islice(environment.stream(0), 100))
    # One task in four is held out, so four resets give three tasks; the survey is kept.
    assert len(resets) <= 128 + 10 + 100 * 1.6


@pytest.mark.parametrize("env", [Numbers, Undeclared, ManyProblems])
def test_a_resumed_run_draws_the_tasks_that_it_would_have_drawn(env):
    whole = TaskSource(from_gymnasium(env).stream(3))
    whole.next_tasks(20)
    state = whole.state()
    resumed = TaskSource(from_gymnasium(env).stream(3))
    resumed.restore(state)
    assert [task.seed for task in resumed.next_tasks(20)] == [
        task.seed for task in whole.next_tasks(20)
    ]


@pytest.mark.slow
def test_a_run_and_an_evaluation_say_that_there_are_few_problems(tmp_path, capsys):
    events = []
    values = {"task.env": "tictactoe", "run.steps": 1, "evaluation.count": 2}
    values |= {"rollout.groups_per_step": 1, "rollout.group_size": 2}
    config = changed(TrainConfig(), values)
    tp.run(config, output=tmp_path / "run", on_event=events.append)
    notes = [event.text for event in events if event.kind == "note"]
    assert any("tictactoe has few problems" in note for note in notes)
    assert main(["eval", "--env", "tictactoe", "--count", "2"]) == 0
    assert "tictactoe has few problems" in capsys.readouterr().out


# Registered ids


@pytest.fixture
def registered():
    gym.register("tests/Numbers-v0", entry_point=Numbers, max_episode_steps=3)
    yield "gymnasium:tests/Numbers-v0"
    del gym.registry["tests/Numbers-v0"]


def test_a_registered_id_keeps_the_contract_without_warnings(registered, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(load(registered), 5)
    assert main(["envs", registered]) == 0
    shown = capsys.readouterr().out
    assert "16 different ones" in shown
    assert "check        passed" in shown


MODULE = """
import gymnasium as gym
from textpolicy.environments import AnyText


class Parrot(gym.Env):
    observation_space = AnyText()
    action_space = AnyText()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.word = f"word{self.np_random.integers(10**6)}"
        return f"repeat {self.word}", {"gold": self.word}

    def step(self, action):
        return "", float(action == self.word), True, False, {}


gym.register("Parrot-v1", entry_point=Parrot)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module in the working directory that registers an id, found without PYTHONPATH."""
    name = f"parrots_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    # Restores sys.path, which loading extends.
    monkeypatch.syspath_prepend(tmp_path / "elsewhere")
    yield name
    gym.registry.pop("Parrot-v1", None)


def test_an_id_of_a_module_in_the_working_directory_is_found_and_checked(module, capsys):
    spec = f"gymnasium:{module}:Parrot-v1"
    check_env(load(spec), 5)
    assert main(["envs", spec]) == 0
    assert "repeat word" in capsys.readouterr().out
    task = next(load(spec).stream(0))
    env = task.env()
    assert env.reset(seed=task.seed)[0] == task.prompt


def test_an_id_that_cannot_be_loaded_names_the_cause(module, tmp_path):
    with pytest.raises(
        TaskError, match=r"gymnasium:parrotz:ID needs the module parrotz.*No module named 'parrotz'"
    ):
        load("gymnasium:parrotz:Parrot-v1")
    (tmp_path / "broken_parrots.py").write_text("import math\nmath.sqrt(-1)\n")
    with pytest.raises(TaskError, match=r"importing the module broken_parrots raised ValueError"):
        load("gymnasium:broken_parrots:Parrot-v1")
    with pytest.raises(
        TaskError, match=r"Environment `Parot` doesn't exist. Did you mean: `Parrot`"
    ):
        load(f"gymnasium:{module}:Parot-v1")
    with pytest.raises(TaskError, match=r"NoSuchThing.*doesn't exist.*gymnasium:MODULE:ID"):
        load("gymnasium:NoSuchThing-v0")


class Remote(Numbers):
    """Waits in each reset, and counts how many resets wait at the same time."""

    waiting, most, lock = 0, 0, Lock()

    def reset(self, *, seed=None, options=None):
        with Remote.lock:
            Remote.waiting += 1
            Remote.most = max(Remote.most, Remote.waiting)
        time.sleep(0.04)
        with Remote.lock:
            Remote.waiting -= 1
        return super().reset(seed=seed, options=options)


def test_resets_that_wait_do_so_side_by_side_and_give_the_same_tasks():
    quick, remote = from_gymnasium(Numbers), from_gymnasium(Remote, name="Numbers")
    drawn = list(islice(remote.stream(3), 40))
    assert [task.id for task in drawn] == [task.id for task in islice(quick.stream(3), 40)]
    assert 2 < Remote.most <= 8
    # Nothing is opened while the tasks are played.
    assert Remote.waiting == 0
