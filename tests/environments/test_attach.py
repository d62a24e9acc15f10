"""A task that went to another process as data plays there as in the process that it came from."""

import pickle
from dataclasses import replace
from itertools import islice

import pytest

from tests.environments.test_envs_files import CHAT, CLASS, SINGLE, TOOLS
from textpolicy.buffer import rollout_to_json
from textpolicy.environments import Environment, load
from textpolicy.environments.preamble import with_preamble
from textpolicy.generation.mlx_generation import create_policy
from textpolicy.generation.policy import ModelPolicy
from textpolicy.generation.scripted import ScriptedPolicy
from textpolicy.rollout.worker import collect
from textpolicy.types import Task

AGENT = """
import json, urllib.request


def make(rng):
    return f"{rng.randint(10, 99)}?", {"bonus": rng.randint(0, 9)}


def play(prompt, example, base_url, api_key):
    body = {"model": "any", "messages": [{"role": "user", "content": prompt}]}
    headers = {"Authorization": f"Bearer {api_key}", "Content-Type": "application/json"}
    url = f"{base_url}/chat/completions"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    urllib.request.urlopen(request).read()
    return len(prompt) + example["bonus"]
"""
MCP_SERVER = """
from mcp.server.mcpserver import MCPServer

server = MCPServer("tests")


@server.tool()
def double(n: int) -> str:
    return str(2 * n)


server.run()
"""
MCP = """
import sys
from pathlib import Path
from textpolicy.environments import mcp_tools, tool_prompt

TOOLS = mcp_tools([sys.executable, str(Path(__file__).with_name("server.py"))])


def make(rng):
    return tool_prompt(TOOLS, f"double {rng.randrange(1000)}"), {}


def reward(completion):
    return float(len(completion))
"""
CALL = '<tool_call>\n{"name": "double", "arguments": {"n": 4}}\n</tool_call>'
FILES = {
    "single": (SINGLE, ["echo 3"]),
    "chat": (CHAT, ["first", "second"]),
    "tools": (TOOLS, ["square(3)", "9"]),
    "class": (CLASS, ["odd", "even"]),
}
RICH = {
    "reasoning_gym:basic_arithmetic": "reasoning_gym",
    "textarena:GuessTheNumber-v0": "textarena",
    "mcp": "mcp",
}


@pytest.fixture(scope="module")
def tokenizer(load_tiny):
    return load_tiny()[1]


@pytest.fixture(scope="module")
def policy(load_tiny):
    return create_policy(*load_tiny(), {"max_tokens": 4})


def assert_plays_the_same(
    environment: Environment, again: Environment, tokenizer, answers, count=2
):
    tasks = list(islice(environment.stream(3), count))
    sent = pickle.loads(pickle.dumps([replace(t, env=None, agent=None) for t in tasks]))
    attached = [again.attach(task) for task in sent]
    for one, other in zip(tasks, attached, strict=True):
        assert (one.env is None, one.agent is None) == (other.env is None, other.agent is None)
    played = [
        rollouts_of(ts, env, tokenizer, answers)
        for ts, env in ((tasks, environment), (attached, again))
    ]
    assert played[0] == played[1]
    return attached, played[0]


def rollouts_of(tasks: list[Task], environment, tokenizer, answers):
    if isinstance(answers, ModelPolicy):
        policy = answers
    else:
        policy = ScriptedPolicy(tokenizer, [answers] * len(tasks))
    groups = collect(tasks, policy, environment.reward, group_size=len(tasks), seed=0)
    environment.close()
    # The last digits of log-probabilities depend on which agents ask at the same time.
    rows = [rollout_to_json(one) for group in groups for one in group.rollouts]
    return [row | {"logprobs": len(row["logprobs"])} for row in rows]


@pytest.mark.parametrize("kind", FILES)
def test_tasks_of_a_file_play_the_same_in_another_process(kind, tmp_path, tokenizer):
    text, answers = FILES[kind]
    path = tmp_path / f"{kind}.py"
    path.write_text(text)
    assert_plays_the_same(load(str(path)), load(str(path)), tokenizer, answers)


def test_tasks_of_an_agent_play_the_same_in_another_process(tmp_path, tokenizer, policy):
    path = tmp_path / "agent.py"
    path.write_text(AGENT)
    first, second = (load(f"agent:{path}") for _ in range(2))
    attached, played = assert_plays_the_same(first, second, tokenizer, policy)
    scores = [len(task.prompt) + task.example["bonus"] for task in attached]
    assert [one["reward"] for one in played] == [score for score in scores for _ in range(2)]


@pytest.mark.parametrize("kind", ["chat", "class"])
def test_episodes_with_a_time_limit_play_the_same_in_another_process(kind, tmp_path, tokenizer):
    text, answers = FILES[kind]
    path = tmp_path / f"{kind}.py"
    path.write_text(text)
    first, second = (load(str(path), env_timeout=60) for _ in range(2))
    assert_plays_the_same(first, second, tokenizer, answers)


def test_tasks_keep_their_preamble_in_another_process(tokenizer):
    environment = with_preamble(load("add"), system="Add.", few_shot=1, seed=0)
    attached, _ = assert_plays_the_same(environment, load("add"), tokenizer, ["3"])
    assert len(attached[0].asked) == 4
    assert_plays_the_same(environment, environment, tokenizer, ["3"])


def test_rows_play_the_same_in_another_process(tokenizer, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"question": "{n}?", "answer": "{n}"}}\n' for n in range(20)))
    first, second = (load("gsm8k", rows) for _ in range(2))
    assert_plays_the_same(first, second, tokenizer, ["#### 3"])


@pytest.mark.slow
@pytest.mark.parametrize("spec", RICH)
def test_tasks_of_a_library_play_the_same_in_another_process(spec, tmp_path, tokenizer):
    pytest.importorskip(RICH[spec])
    answers = ["[3]"]
    if spec == "mcp":
        (tmp_path / "server.py").write_text(MCP_SERVER)
        (tmp_path / "mcp_env.py").write_text(MCP)
        spec, answers = str(tmp_path / "mcp_env.py"), [CALL, "8"]
    _, played = assert_plays_the_same(load(spec), load(spec), tokenizer, answers, count=1)
    if spec.endswith(".py"):
        assert played[0]["turns"][0]["replies"] == [{"role": "tool", "content": "8"}]
