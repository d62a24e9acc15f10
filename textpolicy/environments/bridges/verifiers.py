"""Tasksets of the library verifiers, played as agents.

The library plays a task with its own harness, tools and rewards. The harness asks the policy
through the server of agents, which keeps every token that it samples.
"""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from textpolicy.environments.agent_processes import AgentProcesses
from textpolicy.environments.bridges.verifiers_agent import playing
from textpolicy.environments.dataset import Dataset
from textpolicy.environments.environment import AgentTasks, Environment
from textpolicy.errors import ConfigError, TaskError
from textpolicy.user_code import raise_user_errors_as
from textpolicy.user_code.agent_worker import AgentFile

_MAX_TOKENS = 256
_MAX_TURNS = 64


def load(
    name: str,
    *,
    harness: str = "null",
    max_turns: int = _MAX_TURNS,
    max_tokens: int = _MAX_TOKENS,
) -> Environment:
    """Return the environment of a taskset: the name of an installed module that exports it.

    The harness "null" is a chat with the tools of the taskset. Other harnesses of verifiers may run
    what the model writes on this machine. A tenth of the tasks is held out.
    """
    if find_spec("verifiers") is None:
        raise ConfigError(
            "tasksets of verifiers need the library: pip install 'textpolicy[verifiers]'"
        )
    if shutil.which("uv") is None:
        raise ConfigError(
            "verifiers starts its harness with the program uv, which is not on the PATH: pip "
            "install uv"
        )
    with raise_user_errors_as(TaskError, f"loading the taskset {name} of verifiers"):
        _, tasks = playing.open_taskset(name, harness)
        prompts = [_prompt_text(task.data.prompt) for task in tasks]
    rows = [
        {"prompt": prompt, "taskset": name, "harness": harness, "index": index}
        for index, prompt in enumerate(prompts)
    ]
    agent = AgentFile(path=Path(playing.__file__), function=playing.play_taskset.__name__)
    return Environment(
        name=f"verifiers:{name}",
        tasks=AgentTasks(
            source=Dataset.from_rows(rows, "{prompt}", name=f"verifiers:{name}"),
            agent=AgentProcesses(agent, max_turns=max_turns),
        ),
        max_tokens=max_tokens,
        make_env=lambda reward: _refuse_episodes(name),
    )


def _prompt_text(prompt: Any) -> str:
    """Return the prompt as a text. The library itself gives the prompt to its harness."""
    if isinstance(prompt, str):
        return prompt
    return json.dumps(
        [message.model_dump(exclude_none=True, mode="json") for message in prompt or ()],
        ensure_ascii=False,
    )


def _refuse_episodes(name: str) -> NoReturn:
    raise TaskError(f"verifiers plays the taskset {name}, so there is no Gymnasium environment")
