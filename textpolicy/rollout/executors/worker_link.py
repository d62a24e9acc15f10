"""What a crew and its workers say to each other, whatever carries the messages."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from textpolicy import errors
from textpolicy.buffer import rollout_from_json, rollout_to_json
from textpolicy.errors import ConfigError, TextPolicyError, TrainingError
from textpolicy.rollout.executors.executor import RolloutJob
from textpolicy.types import Rollout, Task

_Play = Literal["answer", "episode", "agent"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedVersion:
    """The file of one adapter version, which nobody changes, and its SHA-256."""

    version: int
    path: Path
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SentJob:
    """A job on its way to a worker. Its tasks are data alone, and `plays` says how each is played.

    The number is that of this try: a job that is sent again has another number.
    """

    number: int
    job: RolloutJob
    plays: Sequence[_Play]


@dataclass(frozen=True, slots=True)
class Ready:
    """The worker is built, and can play jobs."""


@dataclass(frozen=True, slots=True)
class Reloaded:
    """The worker samples with this version from now on."""

    version: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PlayedJob:
    """The rollouts of each task of the job with this number, and what a user should read."""

    number: int
    rollouts: Sequence[Sequence[Rollout]]
    seconds: float = 0.0
    reward_seconds: float = 0.0
    notes: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Failed:
    """The error of the user's code or config that must end the run."""

    error: TextPolicyError


WorkerAnswer = Ready | Reloaded | PlayedJob | Failed


class WorkerEndedError(Exception):
    """The worker has ended, or has said what no worker says. The message says how it ended."""


@runtime_checkable
class WorkerLink(Protocol):
    """One worker, as the run's process sees it."""

    def follow(self, published: PublishedVersion) -> None:
        """Let the jobs that the worker begins from now on use this version, or a newer one."""
        ...

    def play(self, job: SentJob) -> None:
        """Put a job behind the jobs that were sent before."""
        ...

    def answers(self) -> Iterator[WorkerAnswer]:
        """Yield what the worker has said since the last call, without waiting.

        Raise `WorkerEndedError` after the last answer of a worker that has ended.
        """
        ...

    def end(self) -> None:
        """End the worker at once, with everything that it has started."""
        ...


@runtime_checkable
class Transport(Protocol):
    """Starts workers, and waits for them."""

    def start(self, number: int) -> WorkerLink:
        """Start the worker of this number, without waiting until it is ready."""
        ...

    def wait(self, links: Sequence[Any], seconds: float) -> None:
        """Return when a worker has said something or has ended, or after so many seconds.

        The links are those of this transport.
        """
        ...

    def close(self) -> None:
        """End what the transport itself has started. Its workers have ended before."""
        ...


def send_job(job: RolloutJob, number: int) -> SentJob:
    """Return the job as it travels, without the environments and agents of its tasks."""
    plays: list[_Play] = [
        "agent" if task.agent else "episode" if task.env else "answer" for task in job.tasks
    ]
    tasks = [replace(task, env=None, agent=None) for task in job.tasks]
    return SentJob(number=number, job=replace(job, tasks=tasks), plays=plays)


def receive_tasks(sent: SentJob, attach: Callable[[Task], Task]) -> list[Task]:
    """Return the tasks of a job as they were before they were sent.

    Raise `ConfigError` if `attach` does not give a task what it had.
    """
    tasks = list(map(attach, sent.job.tasks))
    for task, play in zip(tasks, sent.plays, strict=True):
        if play != ("agent" if task.agent else "episode" if task.env else "answer"):
            raise ConfigError(
                f"task {task.id} is played as {play!r}, and a rollout worker cannot give it back "
                "what plays it. Give the class of the tasks a method attach(task), which returns "
                "the task with its env or agent, or sample without --workers"
            )
    return tasks


def answer_to_json(answer: WorkerAnswer) -> dict[str, Any]:
    """Return an answer as values that JSON can hold."""
    match answer:
        case Ready():
            return {"ready": True}
        case Reloaded(version):
            return {"following": version}
        case Failed(error):
            return {"failed": type(error).__name__, "text": str(error)}
        case PlayedJob():
            return {
                "played": answer.number,
                "rollouts": [list(map(rollout_to_json, group)) for group in answer.rollouts],
                "seconds": answer.seconds,
                "reward_seconds": answer.reward_seconds,
                "notes": list(answer.notes),
            }


def answer_from_json(content: Mapping[str, Any]) -> WorkerAnswer:
    """Return the answer. Raise `WorkerEndedError` for anything that is none.

    The user's code in a worker could have written what comes from there.
    """
    try:
        match content:
            case {"ready": True}:
                return Ready()
            case {"following": int(version)}:
                return Reloaded(version)
            case {"failed": str(name), "text": str(text)}:
                return Failed(_error(name, text))
            case {"played": int(number), "rollouts": list(groups), "notes": list(notes)}:
                return PlayedJob(
                    number=number,
                    rollouts=[list(map(rollout_from_json, group)) for group in groups],
                    seconds=float(content["seconds"]),
                    reward_seconds=float(content["reward_seconds"]),
                    notes=list(map(str, notes)),
                )
            case _:
                shown = str(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        shown = f"{content!s:.60} ({error})"
    raise WorkerEndedError(f"wrote {shown:.200} where an answer was expected")


def _error(name: str, text: str) -> TextPolicyError:
    kind = vars(errors).get(name)
    if isinstance(kind, type) and issubclass(kind, TextPolicyError):
        return kind(text)
    return TrainingError(f"a rollout worker failed with {name}: {text}")
