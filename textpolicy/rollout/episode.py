"""An episode: one environment that answers a policy turn by turn."""

from collections.abc import Sequence

from textpolicy.environments.environment import opening_prompt
from textpolicy.environments.faults import environment_errors
from textpolicy.environments.play import check_step_result
from textpolicy.errors import TaskError
from textpolicy.types import Completion, Message, StopReason, Task, Turn


class Episode:
    """A new environment that is played for one rollout of a task.

    `cut_off` is True if a limit ended the episode and not the environment. A completion that
    reached `max_tokens` is the last one.
    """

    def __init__(self, task: Task, max_turns: int) -> None:
        assert task.env is not None
        self.turns: list[Turn] = []
        self.cut_off = True
        self.metrics: dict[str, float] = {}
        self._task = task
        self._max_turns = max_turns
        with environment_errors(task.id, "reset"):
            self._env = task.env()
            prompt = opening_prompt(*self._env.reset(seed=task.seed), task.id)
        if prompt != task.prompt:
            raise TaskError(
                f"the environment of task {task.id!r} opens with {prompt!r:.60} for seed "
                f"{task.seed}, but the task's prompt is {task.prompt!r:.60}; make reset(seed=...) "
                "give the same start for the same seed"
            )

    def respond(self, completion: Completion) -> Sequence[Message] | None:
        """Return the messages that the environment replies, or None if the episode is over."""
        where = f"turn {len(self.turns) + 1}, on {completion.text!r:.60}"
        with environment_errors(self._task.id, where):
            observation, reward, terminated, truncated, info = check_step_result(
                self._env.step(completion.text)
            )
            messages = info.get("messages") or [{"role": "user", "content": observation}]
            replies: list[Message] = list(messages)
        unfinished = completion.stop_reason is StopReason.LENGTH
        full = len(self.turns) + 1 >= self._max_turns
        self.cut_off = not terminated and (truncated or unfinished or full)
        self.turns.append(Turn(completion=completion.text, reward=reward, replies=replies))
        metrics = {**info.get("metrics", {}), "turns": len(self.turns)}
        self.metrics = {f"env/{name}": float(value) for name, value in metrics.items()}
        if terminated or self.cut_off:
            return None
        # If no further call comes, the context had no room for another answer.
        self.cut_off = True
        return replies

    def close(self) -> None:
        """Close the environment."""
        with environment_errors(self._task.id, "close"):
            self._env.close()
