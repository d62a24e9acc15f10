"""Agents in processes of their own: scores, errors, time limits, and nothing left behind."""

import json
import os
import threading
import time
from pathlib import Path

import pytest

from textpolicy.environments import load
from textpolicy.environments.agent_processes import AgentProcesses
from textpolicy.errors import ConfigError, TaskError
from textpolicy.types import AgentOutcome, AgentPlay

FUNCTION = """
import asyncio, json, os, subprocess, sys, time

def make(rng):
    return f"{rng.randint(1, 999)}", {"do": "score"}

async def play(prompt, example, model):
    if example["do"] == "score":
        await asyncio.sleep(0)
        return len(prompt) + len(os.environ["OPENAI_API_KEY"]) + len(model)
    if example["do"] == "raise":
        raise ValueError("no way")
    if example["do"] == "exit":
        os._exit(3)
    if example["do"] == "nan":
        return float("nan")
    if example["do"] == "pid":
        return os.getpid()
    if example["do"] == "hang":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"],
                                 start_new_session=True)
        open(example["file"], "w").write(f"{os.getpid()} {child.pid}")
        time.sleep(60)
"""
PROGRAM = """
import json, os, sys

task = json.loads(os.environ["TEXTPOLICY_TASK"])
print("thinking about", task["prompt"])
if task["example"].get("do") == "fail":
    sys.exit("the tool is broken")
if task["example"].get("do") != "silent":
    print(json.dumps({"score": len(task["prompt"]), "model": os.environ["OPENAI_MODEL"]}))
"""


def agent_of(folder: Path, text: str, **limits) -> AgentProcesses:
    path = folder / "my_agent.py"
    path.write_text(text)
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": str(n)}) + "\n" for n in range(4)))
    data = None if "def make" in text else rows
    agent = load(f"agent:{path}", data, **limits).agent
    assert isinstance(agent, AgentProcesses)
    return agent


def play(agent: AgentProcesses, *examples: dict) -> list[AgentOutcome]:
    """Return how the plays ended, in the order of the examples."""
    ended: dict[int, AgentOutcome] = {}
    plays = [
        AgentPlay(prompt="12", example=example, base_url="http://x", api_key="key", model="m")
        for example in examples
    ]
    agent.play(plays, ended.__setitem__)
    return [ended[number] for number in range(len(plays))]


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def test_a_function_is_played_in_processes_that_stay_and_its_errors_are_those_of_its_rollout(
    tmp_path,
):
    agent = agent_of(tmp_path, FUNCTION, agent_processes=2)
    wanted = ["score", "raise", "exit", "nan", "score"]
    score, raised, ended, nan, last = play(agent, *({"do": one} for one in wanted))
    assert score == last == AgentOutcome(score=2 + 3 + 1)
    assert raised.error is not None
    assert "agent play raised ValueError: no way" in raised.error
    assert "my_agent.py, line 12" in raised.error
    assert ended.error is not None
    assert "exited with code 3" in ended.error
    assert nan.error is not None
    assert "expected a finite number or None" in nan.error
    pids = {one.score for _ in range(3) for one in play(agent, *[{"do": "pid"}] * 4)}
    assert 1 <= len(pids) <= 2
    agent.close()
    assert not any(is_alive(int(pid or 0)) for pid in pids)


def test_a_rollout_over_its_time_is_killed_with_all_that_it_started_and_the_others_go_on(tmp_path):
    agent = agent_of(tmp_path, FUNCTION, agent_processes=2, env_timeout=1.0)
    file = tmp_path / "pids"
    late, *others = play(agent, {"do": "hang", "file": str(file)}, *[{"do": "score"}] * 3)
    assert late.error == (
        "the agent took longer than 1 s and was stopped, with all that it had started"
    )
    assert [one.score for one in others] == [6, 6, 6]
    assert not any(is_alive(int(pid)) for pid in file.read_text().split())


def test_stopping_kills_agents_that_still_play(tmp_path):
    agent = agent_of(tmp_path, FUNCTION)
    file = tmp_path / "pids"
    ended: list[int] = []
    plays = AgentPlay(
        prompt="1", example={"do": "hang", "file": str(file)}, base_url="", api_key="", model=""
    )
    stop = threading.Event()
    arguments = [plays], lambda number, outcome: ended.append(number), stop.is_set
    thread = threading.Thread(target=agent.play, args=arguments)
    thread.start()
    while not (file.exists() and len(file.read_text().split()) == 2):
        time.sleep(0.01)
    stop.set()
    agent.wake()
    thread.join(10)
    assert not thread.is_alive()
    assert not ended
    assert not any(is_alive(int(pid)) for pid in file.read_text().split())


def test_a_program_gets_the_task_in_its_environment_and_prints_the_score_in_its_last_line(tmp_path):
    agent = agent_of(tmp_path, PROGRAM)
    score, silent, failed = play(agent, {}, {"do": "silent"}, {"do": "fail"})
    assert score == AgentOutcome(score=2.0)
    assert silent == AgentOutcome()
    assert failed.error is not None
    assert "exited with code 1" in failed.error
    assert "the tool is broken" in failed.error


def test_an_agent_has_the_tasks_of_its_file_or_rows(tmp_path):
    path = tmp_path / "my_agent.py"
    path.write_text(FUNCTION)
    environment = load(f"agent:{path}:play")
    task = next(environment.stream(0))
    assert task.agent is environment.agent is not None
    assert task.prompt not in {one.prompt for one in environment.heldout(20)}
    with pytest.raises(TaskError, match="there is no Gymnasium environment"):
        environment.make()
    path.write_text(PROGRAM)
    with pytest.raises(TaskError, match=r"no tasks\. Name a file of rows"):
        load(f"agent:{path}")


@pytest.mark.parametrize(
    ("text", "spec", "message"),
    [
        ("def play(prompt, tools): ...", "agent:{}", "asks for tools; an agent gets any of prompt"),
        ("x = 1", "agent:{}:x", r"is 1 \(int\); expected a function"),
        ("x = 1", "agent:{}:y", "has no function 'y'"),
        ("def play(", "agent:{}", "cannot be read"),
        ("", "agent:{}.txt", "names no Python file"),
        ("", "agent:nowhere.py", "does not exist"),
    ],
)
def test_what_is_no_agent_is_refused_with_what_to_write(tmp_path, text, spec, message):
    path = tmp_path / "my_agent.py"
    path.write_text(text)
    with pytest.raises((TaskError, ConfigError), match=message):
        load(spec.format(path))


def test_only_agents_have_a_number_of_processes():
    with pytest.raises(ConfigError, match="is no agent"):
        load("add", agent_processes=2)


def test_no_descriptor_is_left_open(tmp_path):
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    agent = agent_of(tmp_path, FUNCTION)
    before = count()
    play(agent, {"do": "score"})
    agent.close()
    assert count() == before
