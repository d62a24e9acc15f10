"""One environment being played, and the rollout that the tokens of its turns make."""

from collections.abc import Mapping, Sequence
from typing import Any

from textpolicy.environments.check_env import check_step_result
from textpolicy.environments.environment import opening_prompt
from textpolicy.environments.faults import environment_errors
from textpolicy.errors import TaskError
from textpolicy.types import Completion, Message, StopReason, Task, Turn


class Episode:
    """A fresh environment for one rollout of a task: answers go in, what is heard comes out.

    `cut` tells that a limit ended it, not the environment. An answer that was cut off in the
    middle is the last.
    """

    def __init__(self, task: Task, max_turns: int) -> None:
        assert task.env is not None
        self.turns: list[Turn] = []
        self.cut = True
        self.metrics: dict[str, float] = {}
        self._task = task
        self._max_turns = max_turns
        with environment_errors(task.id, "reset"):
            self._env = task.env()
            prompt, _ = opening_prompt(*self._env.reset(seed=task.seed), task.id)
        if prompt != task.prompt:
            raise TaskError(
                f"the environment of task {task.id!r} opens with {prompt!r:.60} for seed "
                f"{task.seed}, and did so with {task.prompt!r:.60}; expected the same seed to give "
                "the same start"
            )

    def respond(self, said: Completion) -> Sequence[Message] | None:
        """The messages that the environment answers with; None when the episode is over."""
        where = f"turn {len(self.turns) + 1}, on {said.text!r:.60}"
        with environment_errors(self._task.id, where):
            observation, reward, terminated, truncated, info = check_step_result(
                self._env.step(said.text)
            )
            replies = _replies(observation, info)
        unfinished = said.stop_reason is StopReason.LENGTH
        full = len(self.turns) + 1 >= self._max_turns
        self.cut = not terminated and (truncated or unfinished or full)
        self.turns.append(Turn(completion=said.text, reward=reward, replies=replies))
        self._count(info.get("metrics", {}))
        if terminated or self.cut:
            return None
        # Unless it is asked again, there was no room for another answer.
        self.cut = True
        return replies

    def _count(self, metrics: Mapping[str, float]) -> None:
        self.metrics = {f"env/{name}": float(value) for name, value in metrics.items()}
        self.metrics["env/turns"] = float(len(self.turns))

    def close(self) -> None:
        with environment_errors(self._task.id, "close"):
            self._env.close()


def _replies(observation: str, info: dict[str, Any]) -> list[Message]:
    """What `step` says next: `info["messages"]`, or the observation as a user message."""
    if messages := info.get("messages"):
        return list(messages)
    return [{"role": "user", "content": observation}]
