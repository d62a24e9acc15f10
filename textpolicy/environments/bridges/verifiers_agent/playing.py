"""Play one task of a taskset of verifiers 0.4. This file is the agent, in a process of its own."""

from functools import lru_cache
from importlib import import_module
from itertools import islice
from typing import Any

_MAX_TASKS = 10_000


@lru_cache
def open_taskset(name: str, harness: str) -> tuple[Any, list[Any]]:
    """Return the environment of a taskset, and its first 10,000 tasks."""
    loaders = import_module("verifiers.v1.utils.loaders")
    agent = {"harness": {"id": harness}, "runtime": {"type": "subprocess"}}
    config = loaders.resolve_env_config({"taskset": {"id": name}, "agent": agent})
    environment = loaders.load_environment(config)
    return environment, list(islice(environment.taskset, _MAX_TASKS))


async def play_taskset(example: dict[str, Any], base_url: str, model: str) -> float:
    """Let the library play a task against the policy; return the reward of the taskset."""
    library: Any = import_module("verifiers.v1")
    run_slot: Any = import_module("verifiers.v1.env").RunSlot
    sampling: Any = import_module("verifiers.v1.types").SamplingConfig
    environment, tasks = open_taskset(example["taskset"], example["harness"])
    # The key of this rollout is in the variable, as for every agent.
    client = library.EvalClientConfig(base_url=base_url, api_key_var="OPENAI_API_KEY")
    context = library.ModelContext(client=client, model=model, sampling=sampling())
    async with environment.serving():
        episode = await environment.run_slot(run_slot(tasks[example["index"]]), context)
    if not episode.ok:
        errors = [*episode.errors, *(error for trace in episode.traces for error in trace.errors)]
        raise RuntimeError("; ".join(f"{error.type}: {error.message}" for error in errors))
    return sum(trace.reward for trace in episode.traces)
