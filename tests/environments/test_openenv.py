"""Environments of OpenEnv servers: sessions of their own, seeds, text both ways, and faults."""

import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from itertools import islice

import pytest

from textpolicy.environments import check_env, load, sum_turn_rewards
from textpolicy.environments.bridges.openenv import ActionForm, observation_text
from textpolicy.environments.bridges.openenv import load as load_openenv
from textpolicy.errors import ConfigError, TaskError
from textpolicy.generation.scripted import ScriptedPolicy
from textpolicy.rollout.worker import collect

needs_openenv = pytest.mark.skipif(
    not find_spec("openenv"), reason="the extra [openenv] is not installed"
)

SERVER = '''
import os, random, sys, time, uvicorn
from openenv.core.env_server.http_server import create_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, Observation, State

class Guess(Action):
    number: int

class Hint(Observation):
    text: str

class Game(Environment):
    """Guess a number of three digits, which the seed decides."""
    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed=None, episode_id=None, **kwargs):
        self.number, self.said = random.Random(seed).randrange(1000), []
        return Hint(text=f"number {self.number}")

    def step(self, action):
        if action.number == -1:
            time.sleep(60)
        if action.number == -2:
            raise KeyError("lost")
        if action.number == -3:
            os._exit(3)
        self.said.append(action.number)
        found = action.number == self.number
        return Hint(text=f"{self.said}", done=found, reward=float(found))

    @property
    def state(self):
        return State(step_count=len(self.said))

app = create_app(Game, Guess, Hint, env_name="game", max_concurrent_envs=int(sys.argv[2]))
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="error")
'''


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Start servers with so many sessions; return the URL and the process."""
    path = tmp_path_factory.mktemp("openenv") / "server.py"
    path.write_text(SERVER)
    processes = []

    def start(sessions):
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        process = subprocess.Popen([sys.executable, str(path), str(port), str(sessions)])
        processes.append(process)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return f"http://127.0.0.1:{port}", process
            time.sleep(0.1)
        raise AssertionError("the server did not start")

    yield start
    for process in processes:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def url(start):
    return start(16)[0]


def play(load_tiny, environment, scripts, **options):
    _, tokenizer = load_tiny()
    tasks = list(islice(environment.stream(0), len(scripts)))
    policy = ScriptedPolicy(tokenizer, scripts)
    groups = collect(tasks, policy, sum_turn_rewards, group_size=1, seed=0, **options)
    return [group.rollouts[0] for group in groups]


@pytest.mark.slow
@needs_openenv
def test_a_server_is_an_environment_with_seeds_and_keeps_the_contract(url):
    environment = load(f"openenv:{url}")
    check_env(environment, 5)
    prompts = [[task.prompt for task in islice(environment.stream(1), 5)] for _ in range(2)]
    assert prompts[0] == prompts[1] and len({*prompts[0]}) > 1
    held_out = {task.prompt for task in environment.heldout(20)}
    assert held_out and not held_out & {task.prompt for task in islice(environment.stream(0), 50)}


@pytest.mark.slow
@needs_openenv
def test_rollouts_play_side_by_side_in_sessions_of_their_own(load_tiny, url):
    environment = load(f"openenv:{url}")
    numbers = [task.prompt.split()[1] for task in islice(environment.stream(0), 6)]
    scripts = [["one", f"{n % 7}", '{"number": 7}', number] for n, number in enumerate(numbers)]
    for n, rollout in enumerate(play(load_tiny, environment, scripts)):
        assert [turn.replies[0]["content"] for turn in rollout.turns] == [
            "error: expected number as JSON: integer",
            f"[{n}]",
            f"[{n}, 7]",
            f"[{n}, 7, {numbers[n]}]",
        ]
        assert rollout.reward == 1.0


@pytest.mark.slow
@needs_openenv
@pytest.mark.parametrize("options", [{}, {"env_timeout": 60.0}])
def test_a_server_that_fails_hangs_or_dies_costs_its_episode_a_clear_error(
    load_tiny, start, options
):
    url, _ = start(16)
    environment = load_openenv(url, timeout=3.0)
    if options:
        environment = load(f"openenv:{url}", **options)
    for answer, problem in [("-2", "lost"), ("-3", "onnection"), ("5", "Failed to connect")]:
        with pytest.raises(TaskError, match=problem):
            play(load_tiny, environment, [[answer, "5"]])


@pytest.mark.slow
@needs_openenv
def test_limits_are_errors_that_say_what_to_do(load_tiny, start, url):
    environment = load_openenv(url, timeout=1.0)
    with pytest.raises(TaskError, match="gave no answer to a step within 1 s"):
        play(load_tiny, environment, [["-1"]])
    (rollout,) = play(load_tiny, load_openenv(url, max_turns=2), [["5", "5", "5"]])
    assert len(rollout.turns) == 2
    single, _ = start(1)
    with pytest.raises(TaskError, match=r"no free session.*higher\s+max_concurrent_envs"):
        play(load_tiny, load(f"openenv:{single}"), [["5"], ["6"]])
    with pytest.raises(TaskError, match=r"no OpenEnv server answers at http://127.0.0.1:9/schema"):
        load("openenv:http://127.0.0.1:9")


@needs_openenv
def test_functions_of_a_file_replace_the_rules_for_text(url):
    environment = load_openenv(
        url,
        observe=lambda observation: f"say {observation['text']}",
        act=lambda answer: {"number": len(answer)},
    )
    task = next(environment.stream(0))
    assert task.prompt.startswith("say number ")
    env = environment.make()
    env.reset(seed=0)
    assert env.step("four")[0] == "say [4]"
    # The client would connect again, to an environment that nobody has reset.
    env._client.disconnect()
    with pytest.raises(TaskError, match="ended the session in the middle of the episode"):
        env.step("four")
    env.close()


def test_an_observation_of_one_text_is_this_text_and_another_is_json():
    assert observation_text({"message": "hä", "done": False, "reward": 1, "hint": None}) == "hä"
    assert observation_text({"board": [1], "turn": "ä"}) == '{"board": [1], "turn": "ä"}'
    assert observation_text({"n": 1}) == '{"n": 1}'
    assert observation_text({}) == "{}"


def test_an_answer_is_the_only_field_of_an_action_or_json_with_its_fields():
    schema = {"properties": {"message": {"type": "string"}, "metadata": {"type": "object"}}}
    form = ActionForm.of(schema)
    assert form.action(" hi ") == {"message": " hi "}
    assert form.action('{"message": "hi"}') == {"message": "hi"}
    assert form.action('{"text": "hi"}') == {"message": '{"text": "hi"}'}
    fields = {"x": {"type": "integer"}, "y": {"type": "number"}, "note": {"type": "string"}}
    move = ActionForm.of({"properties": fields, "required": ["x", "y"]})
    assert move.action('{"x": 1, "y": 2.5}') == {"x": 1, "y": 2.5}
    for answer in ["1", '{"x": 1}', '{"x": 1, "y": 2, "z": 3}', "[1, 2]"]:
        with pytest.raises(ValueError, match="expected a JSON object with x, y"):
            move.action(answer)
    number = ActionForm.of({"properties": {"x": {"type": "number"}}, "required": ["x"]})
    assert number.action(" 2.5\n") == {"x": 2.5}
    with pytest.raises(ValueError, match="expected x as JSON: number"):
        number.action("two")


def test_what_is_no_url_and_a_missing_library_are_refused(monkeypatch):
    with pytest.raises(TaskError, match="expected openenv:http://HOST:PORT"):
        load("openenv:localhost:8000")
    monkeypatch.setitem(sys.modules, "openenv.core.generic_client", None)
    monkeypatch.setitem(sys.modules, "openenv.core", None)
    monkeypatch.setitem(sys.modules, "openenv", None)
    with pytest.raises(ConfigError, match=r"pip install 'textpolicy\[openenv\]'"):
        load("openenv:http://127.0.0.1:9")
