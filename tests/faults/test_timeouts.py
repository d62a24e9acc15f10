"""Environments and tools with a time limit: what hangs is killed, and nothing else changes."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import pytest

from tests.quick import quick_first
from textpolicy.environments import load, sum_turn_rewards
from textpolicy.errors import ConfigError, TaskError
from textpolicy.generation.mlx_generation import create_policy
from textpolicy.generation.scripted import ScriptedPolicy
from textpolicy.rewards import Rewards, scorer_of
from textpolicy.rollout.worker import collect

GAME = '''
import os, re, subprocess, sys, time
import gymnasium as gym

class Game(gym.Env):
    """Three turns. The seed is part of every observation; the answer says what goes wrong."""

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.said = []
        where = os.environ.get("GAME_HANGS", "")
        if where == "reset":
            time.sleep(60)
        return f"start {self.np_random.integers(1000)}", {"problem": f"{seed}"}

    def step(self, answer):
        if answer == "hang":
            time.sleep(60)
        if answer == "spin":
            re.fullmatch("(a+)+", "a" * 60 + "b")
        if answer == "print":
            print("last words")
            os._exit(4)
        if answer == "session":
            subprocess.Popen(
                [sys.executable, "-c", "import time; time.sleep(60)", os.environ["MARK"]],
                start_new_session=True,
            )
            time.sleep(60)
        if answer == "raise":
            raise SystemExit("no")
        if answer == "forge":
            import gc
            from textpolicy.user_code.killable_process import ParentLink
            (link,) = [one for one in gc.get_objects() if isinstance(one, ParentLink)]
            link.send(request=10**6, answer=[1e9, True, False, {}])
        self.said.append(answer)
        text = f"{self.said} {self.np_random.integers(1000)}"
        return text, float(len(answer)), len(self.said) == 3, False, {"metrics": {"n": 1.0}}

    def close(self):
        if self.said[:1] == ["close"]:
            time.sleep(60)
'''
TOOLS = '''
import os, time

def make(rng):
    return f"work {rng.randrange(10**9)}", {}

def nap(seconds: float) -> str:
    """Sleep."""
    time.sleep(seconds)
    return f"slept {seconds}"

def leave(code: int) -> int:
    """Leave."""
    os._exit(code)

def where() -> bool:
    """Where am I?"""
    return os.getpid() != PID

PID = {pid}
TOOLS = [nap, leave, where]
CALLS = "written"

def turn_reward(answers, example):
    return 0.5

def reward(prompt, completion, example):
    return float(completion == "done")
'''


@pytest.fixture
def game(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    path = tmp_path / "game.py"
    path.write_text(GAME)
    return f"{path}:Game"


def play(load_tiny, environment, scripts, rewards=sum_turn_rewards):
    """Return one rollout for each script of answers, played on tasks of the environment."""
    _, tokenizer = load_tiny()
    tasks = list(islice(environment.stream(0), len(scripts)))
    policy = ScriptedPolicy(tokenizer, scripts)
    groups = collect(tasks, policy, rewards, group_size=1, seed=0)
    return [rollout for group in groups for rollout in group.rollouts]


LATE = "took longer than 0.5 s and was stopped, with all that it had started"
FAULTS = {
    "hang": f"step {LATE}",
    "spin": f"step {LATE}",
    "print": "step ended its process, which exited with code 4\n    last words",
    "raise": "SystemExit: no",
    "forge": "step: its process wrote {'request': 1000000",
}


@pytest.mark.slow
@pytest.mark.proves("F10", "F21")
def test_what_goes_wrong_costs_its_episode_and_the_others_go_on(load_tiny, game, attempts):
    scripts = [["a", "b", "c"], *[["a", fault, "c"] for fault in FAULTS], ["a", "bb", "c"]]
    limited = load(game, env_timeout=0.5)
    with scorer_of(Rewards(sum_turn_rewards, on_error="skip", max_error_rate=1)) as scorer:
        started = time.monotonic()
        first, *faulty, last = play(load_tiny, limited, scripts, scorer)
        assert time.monotonic() - started < 15
    attempts(len(faulty))
    for (fault, message), rollout in zip(FAULTS.items(), faulty, strict=True):
        assert rollout.reward is None
        assert f"turn 2, on '{fault}': {message}" in rollout.error
    assert (first.reward, last.reward) == (3.0, 4.0)
    # The process was killed four times in between: the others were restored, and did not notice.
    alone = play(load_tiny, load(game), [scripts[0], *[["x"] * 3] * len(FAULTS), scripts[-1]])
    assert [first.turns, last.turns] == [alone[0].turns, alone[-1].turns]


@pytest.mark.slow
def test_episodes_of_several_threads_share_a_process_in_which_one_hangs(game):
    scripts = [["a", "b", "c"], ["a", "hang"], ["dd", "e", "f"], ["a", "bb", "c"]]

    def steps(task, answers):
        env = task.env()
        env.reset(seed=task.seed)
        seen = []
        for answer in answers:
            try:
                seen.append(env.step(answer))
            except TaskError as error:
                seen.append(str(error))
        return seen

    tasks = list(islice(load(game, env_timeout=1.0).stream(0), len(scripts)))
    with ThreadPoolExecutor(len(scripts)) as threads:
        first, faulty, *others = threads.map(steps, tasks, scripts)
    assert faulty[1] == "step took longer than 1 s and was stopped, with all that it had started"
    alone = list(islice(load(game, env_timeout=1.0).stream(0), len(scripts)))
    expected = [
        steps(task, script)
        for task, script in zip(alone, scripts, strict=True)
        if "hang" not in script
    ]
    assert [first, *others] == expected


@pytest.mark.slow
@pytest.mark.proves("F10")
def test_reset_and_close_that_hang_are_killed_too(load_tiny, game, attempts, monkeypatch):
    attempts(2)
    limited = load(game, env_timeout=0.5)
    rewards = Rewards(sum_turn_rewards, on_error="skip", max_error_rate=1)
    rollouts = play(load_tiny, limited, [["close", "b", "c"], ["a", "b", "c"]], rewards)
    assert "close: close took longer than 0.5 s and was stopped" in rollouts[0].error
    assert rollouts[1].reward == 3.0
    monkeypatch.setenv("GAME_HANGS", "reset")
    with pytest.raises(TaskError, match=r"seed \d+: reset took longer than 0.5 s and was stopped"):
        next(load(game, env_timeout=0.5).stream(0))


@pytest.mark.slow
@pytest.mark.proves("F10")
def test_a_session_that_a_hanging_step_started_is_killed_too(
    load_tiny, game, attempts, monkeypatch
):
    attempts.add()
    mark = f"orphan-{os.getpid()}"
    monkeypatch.setenv("MARK", mark)
    with pytest.raises(TaskError, match="step took longer than"):
        play(load_tiny, load(game, env_timeout=0.5), [["session"]])
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert mark not in running


@pytest.mark.parametrize("name", quick_first(1, ["hilo", "calculator", "tictactoe", "wordle"]))
def test_episodes_in_another_process_equal_those_in_this_one(load_tiny, name):
    model, tokenizer = load_tiny()
    found = []
    for options in ({}, {"env_timeout": 20.0}):
        environment = load(name, **options)
        tasks = [*islice(environment.stream(3), 3), *environment.heldout(2)]
        policy = create_policy(model, tokenizer, {"max_tokens": 8})
        groups = collect(tasks, policy, environment.reward, group_size=2, seed=1)
        found.append([(g.task.prompt, g.task.example, g.rollouts) for g in groups])
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.proves("F10")
def test_a_tool_that_hangs_is_killed_and_the_model_is_told(load_tiny, tmp_path, attempts):
    path = tmp_path / "tools.py"
    path.write_text(TOOLS.replace("{pid}", str(os.getpid())))
    script = ["nap(60)", "leave(3)", "nap(0)\nwhere()", "done"]
    for options in ({"tool_timeout": 0.5}, {"tool_timeout": 0.5, "env_timeout": 20.0}):
        attempts.add()
        (rollout,) = play(load_tiny, load(str(path), **options), [script])
        assert [[m["content"] for m in turn.replies] for turn in rollout.turns[:3]] == [
            [f"error: tool nap {LATE}"],
            ["error: tool leave ended its process, which exited with code 3"],
            ["slept 0", "True"],
        ]
        assert rollout.metrics["env/tool_errors"] == 2.0 and rollout.reward == 3.0


def test_what_another_process_could_not_import_is_refused(tmp_path):
    (tmp_path / "inner.py").write_text(
        "def make(rng):\n    return str(rng.random()), {}\n"
        "def outer():\n    def reply(answers, example): ...\n    return reply\n"
        "reply = outer()\n"
        "def reward(prompt, completion, example):\n    return 1.0\n"
    )
    load(f"{tmp_path}/inner.py")
    with pytest.raises(
        ConfigError, match=r"environment inner cannot run with a timeout.*top level"
    ):
        load(f"{tmp_path}/inner.py", env_timeout=1.0)
    with pytest.raises(ConfigError, match="environment hilo is no file with TOOLS"):
        load("hilo", tool_timeout=1.0)
    assert load("add", env_timeout=1.0).heldout(1)[0].env is None
