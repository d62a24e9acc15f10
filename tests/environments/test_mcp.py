"""Tools of MCP servers: what a server says or does is an answer to the model or a clear error."""

import os
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import pytest

from textpolicy.environments import ToolEnv, load, mcp_tools, sum_turn_rewards, tool_prompt
from textpolicy.environments.mcp.tools import McpEpisode
from textpolicy.environments.tool_calls import parse_python_calls, tool_schema
from textpolicy.errors import ConfigError, TaskError
from textpolicy.generation.scripted import ScriptedPolicy
from textpolicy.rollout.worker import collect

pytestmark = pytest.mark.skipif(not find_spec("mcp"), reason="the extra [mcp] is not installed")

SERVER = '''
import os, sys, time
from typing import Literal
from mcp import SamplingMessage
from mcp.types import ImageContent, TextContent
from mcp.server.mcpserver import Context, MCPServer

server = MCPServer("tests")
count = 0

@server.tool()
def add(a: int, b: int = 2, unit: Literal["", "€"] = "") -> str:
    """Add two numbers: ä, 数, 🙂."""
    return f"{a + b}{unit}"

@server.tool(name="say-it")
def say(text: str) -> str:
    return text

@server.tool()
def step() -> str:
    """How often it was called in this process."""
    global count
    count += 1
    return f"{count} in {os.getpid()}"

@server.tool()
def nap(seconds: float) -> str:
    time.sleep(seconds)
    return "rested"

@server.tool()
def leave() -> str:
    print("last words", file=sys.stderr, flush=True)
    os._exit(3)

@server.tool()
def fail() -> str:
    raise ValueError("no such città")

@server.tool()
def flood(characters: int) -> str:
    print("noise " * 100_000, file=sys.stderr, flush=True)
    if len(sys.argv) < 2:
        os.write(1, b"this is no message\\n[1, 2\\n{}\\n" * 100)
    return "x" * characters

@server.tool()
def picture() -> list[TextContent | ImageContent]:
    return [TextContent(type="text", text="a cat"),
            ImageContent(type="image", data="AA==", **{"mimeType": "image/png"})]

@server.tool()
async def ask(context: Context) -> str:
    message = SamplingMessage(role="user", content=TextContent(type="text", text="who are you?"))
    return str(await context.session.create_message([message], max_tokens=5))

if sys.argv[1:]:
    server.run("streamable-http", port=int(sys.argv[1]))
server.run()
'''
ENVIRONMENT = '''
import sys
from pathlib import Path
from textpolicy.environments import mcp_tools, tool_prompt

def double(number: int) -> int:
    """Twice the number."""
    return 2 * number

COMMAND = [sys.executable, str(Path(__file__).with_name("server.py"))]
TOOLS = [double, *mcp_tools(COMMAND, only=["step", "nap", "add"])]
CALLS = "written"

def make(rng):
    return tool_prompt(TOOLS, f"count {rng.randrange(10**9)}"), {}

def turn_reward(answers, example):
    return 0.5

def reward(prompt, completion, example):
    return float(completion == "done")
'''


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    path = tmp_path_factory.mktemp("mcp") / "server.py"
    path.write_text(SERVER)
    path.with_name("env.py").write_text(ENVIRONMENT)
    return [sys.executable, str(path)]


@pytest.fixture(scope="module")
def tools(command):
    return {tool.name: tool for tool in mcp_tools(command, timeout=20.0)}


@pytest.fixture
def call(tools):
    """Call tools in one episode; without a tool, return the episode."""
    episode = McpEpisode()
    yield lambda name, **arguments: episode.call(tools[name], arguments)
    episode.close()


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A process that has ended stays in the table until its parent asks how.
    return b") Z " not in Path(f"/proc/{pid}/stat").read_bytes()


def wait_until_gone(pid, seconds=8.0):
    deadline = time.monotonic() + seconds
    while is_running(pid):
        assert time.monotonic() < deadline, "the server is still running"
        time.sleep(0.02)


def say(name, **arguments):
    from json import dumps

    return f"<tool_call>{dumps({'name': name, 'arguments': arguments})}</tool_call>"


def test_the_model_reads_the_tools_and_their_answers_as_those_of_functions(tools):
    schema = tool_schema(tools["add"])["function"]
    assert schema["description"] == "Add two numbers: ä, 数, 🙂."
    assert schema["parameters"]["required"] == ["a"]
    assert '"name": "say-it"' in tool_prompt(list(tools.values()), "go")[0]["content"]
    env = ToolEnv(lambda rng: ("go", {}), list(tools.values()))
    env.reset(seed=0)
    calls = {
        say("add", a=1): "3",
        say("add", a=1, b=1, unit="€"): "2€",
        say("say-it", text="数 🙂 <|im_end|>"): "数 🙂 <|im_end|>",
        say("picture"): "a cat\n[image, which is no text]",
        say("add", b=1): "error: add needs 'a'",
        say("add", a="x"): "error: a is 'x'; expected integer",
        say("add", a=1, c=1): "error: add has no 'c'; it has a, b, unit",
        say("minus"): f"error: no tool 'minus'; the tools are {', '.join(tools)}",
        say("flood", characters=5000): f"{'x' * 4000}… (5000 characters, cut)",
    }
    messages = env.step("".join(calls))[4]["messages"]
    env.close()
    assert [message["content"] for message in messages] == list(calls.values())


def test_what_a_server_refuses_is_an_error_that_the_model_reads(call):
    for name, arguments, part in [
        ("fail", {}, "Error executing tool fail"),
        ("add", {"a": 1, "unit": "$"}, "unit"),
        ("ask", {}, "ampling"),
    ]:
        text, returned = call(name, **arguments)
        assert text.startswith("error: ") and part in text and not returned
    assert call("add", a=1) == ("3", True)
    assert call("flood", characters=10**6 + 1) == (
        "error: 1000001 characters came; expected at most 1000000",
        False,
    )


@pytest.mark.slow
def test_a_call_that_hangs_ends_with_its_server_and_the_episode_continues(tools, call):
    assert call("step")[0].startswith("1 in")
    env = ToolEnv(lambda rng: ("go", {}), [*tools.values(), is_running], tool_timeout=1.0)
    env.reset(seed=0)
    pid = int(env.step(say("step"))[0].split()[-1])
    late = "error: tool nap took longer than 1 s and was stopped, with its server"
    assert env.step(say("nap", seconds=60.0))[0] == late
    replies = env.step(say("step") + say("is_running", pid=os.getpid()))[0].split("\n")
    assert replies[0].startswith("1 in") and replies[1] == "True"
    env.close()
    assert call("step")[0].startswith("2 in")
    wait_until_gone(pid)


def test_a_server_that_dies_is_an_error_and_the_next_call_has_a_new_one(call):
    assert call("leave") == ("error: tool leave ended its server\n    last words", False)
    assert call("step")[0].startswith("1 in")


@pytest.mark.slow
def test_each_episode_has_a_server_of_its_own_unless_all_share_one(command, tools):
    (shared,) = mcp_tools(command, only=["step"], sessions="run")
    for tool, counts in [(tools["step"], ["1", "1", "2"]), (shared, ["1", "2", "3"])]:
        episodes = [McpEpisode(), McpEpisode()]
        said = [episodes[which].call(tool, {})[0] for which in (0, 1, 0)]
        assert [text.split()[0] for text in said] == counts
        for episode in episodes:
            episode.close()
    assert shared().startswith("4 in")
    wait_until_gone(int(tools["step"]().split()[-1]))


def test_an_episode_that_nobody_closes_is_closed_before_the_next_call(tools, call):
    pid = int(McpEpisode().call(tools["step"], {})[0].split()[-1])
    assert call("add", a=1) == ("3", True)
    wait_until_gone(pid)


@pytest.mark.slow
def test_rollouts_play_with_servers_of_their_own_at_the_same_time(load_tiny, command):
    _, tokenizer = load_tiny()
    environment = load(str(Path(command[1]).with_name("env.py")))
    scripts = [["step()\nstep()", "double(4)\nadd(1, b=4)", "done"]] * 3
    (task,) = islice(environment.stream(0), 1)
    (group,) = collect(
        [task], ScriptedPolicy(tokenizer, scripts), sum_turn_rewards, group_size=3, seed=0
    )
    replies = [[m["content"] for m in turn.replies] for r in group.rollouts for turn in r.turns[:2]]
    assert [[text.split()[0] for text in turn] for turn in replies] == [["1", "2"], ["8", "5"]] * 3
    pids = {turn[0].split()[-1] for turn in replies[::2]}
    assert len(pids) == 3 and [rollout.reward for rollout in group.rollouts] == [2.5] * 3
    for pid in pids:
        wait_until_gone(int(pid))


@pytest.mark.slow
def test_the_time_limit_of_tools_holds_in_the_process_of_a_timed_environment(load_tiny, command):
    _, tokenizer = load_tiny()
    path = str(Path(command[1]).with_name("env.py"))
    environment = load(path, tool_timeout=0.5, env_timeout=60.0)
    policy = ScriptedPolicy(tokenizer, [["nap(60)", "nap(0)\ndouble(4)", "done"]])
    tasks = list(islice(environment.stream(0), 1))
    (group,) = collect(tasks, policy, sum_turn_rewards, group_size=1, seed=0)
    (rollout,) = group.rollouts
    assert [[m["content"] for m in turn.replies] for turn in rollout.turns[:2]] == [
        ["error: tool nap took longer than 0.5 s and was stopped, with its server"],
        ["rested", "8"],
    ]
    assert rollout.metrics["env/tool_errors"] == 1.0 and rollout.reward == 2.5


@pytest.mark.parametrize(
    ("program", "seconds", "problem"),
    [
        ("import sys; sys.exit('no licence')", 20.0, r"did not start: .*closed.*\n    no licence"),
        (
            "print('hello', flush=True); input(); input()",
            0.5,
            "it gave no answer of an MCP server within 0.5 s",
        ),
    ],
)
def test_a_server_that_does_not_start_is_an_error_with_its_last_words(program, seconds, problem):
    with pytest.raises(TaskError, match=f"(?si)the MCP server .*{problem}"):
        mcp_tools([sys.executable, "-c", program], start_timeout=seconds)


def test_wrong_servers_tools_and_options_are_refused(command, tools, monkeypatch):
    with pytest.raises(TaskError, match="did not start: FileNotFoundError"):
        mcp_tools("no-such-program --help")
    with pytest.raises(
        TaskError, match=r"has no tools \['plus'\]; its tools are \['add', 'say-it'"
    ):
        mcp_tools(command, only=["plus"])
    with pytest.raises(TaskError, match="several tools have the same name"):
        ToolEnv(lambda rng: ("go", {}), [tools["add"], tools["add"]])
    for given, problem in [
        ({"server": " "}, "empty command"),
        ({"timeout": 0}, "expected seconds above 0"),
        ({"headers": {"Authorization": "x"}}, "headers are for the URL"),
    ]:
        with pytest.raises(ConfigError, match=problem):
            mcp_tools(**{"server": command} | given)
    with pytest.raises(TaskError, match=r"^Error executing tool fail"):
        tools["fail"]()
    assert parse_python_calls("say-it(1)\nadd(1, 2)", tools)[1].arguments == {"a": 1, "b": 2}
    monkeypatch.setitem(sys.modules, "mcp", None)
    with pytest.raises(ConfigError, match=r"pip install 'textpolicy\[mcp\]'"):
        mcp_tools(command)


@pytest.fixture
def http_server(command):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    process = subprocess.Popen(
        [*command, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(400):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}/mcp", process
    finally:
        process.kill()
        process.wait()


def test_a_server_at_a_url_answers_and_its_end_is_an_error(http_server):
    url, process = http_server
    tools = {tool.name: tool for tool in mcp_tools(url, timeout=20.0, headers={"X-Who": "me"})}
    episode = McpEpisode()
    assert episode.call(tools["add"], {"a": 1}) == ("3", True)
    assert episode.call(tools["fail"], {})[0].startswith("error: Error executing tool fail")
    process.send_signal(signal.SIGKILL)
    process.wait()
    text, returned = episode.call(tools["add"], {"a": 1})
    assert text.startswith("error: ") and not returned
    episode.close()
    with pytest.raises(TaskError, match=f"the MCP server '{url}' did not start"):
        McpEpisode().call(tools["add"], {"a": 1})


@pytest.mark.slow
def test_no_server_outlives_a_run_that_is_killed(command):
    program = (
        f"from textpolicy.environments import mcp_tools\n"
        f"from textpolicy.environments.mcp.tools import McpEpisode\n"
        f"(tool,) = mcp_tools({command!r}, only=['step'])\n"
        "episode = McpEpisode()\n"
        "print(episode.call(tool, {})[0], flush=True)\n"
        "input()\n"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert run.stdout is not None
    pid = int(run.stdout.readline().split()[-1])
    assert is_running(pid)
    run.kill()
    run.communicate()
    wait_until_gone(pid)
