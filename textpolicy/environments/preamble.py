"""What a model reads before the prompt of a task: a system message and solved examples."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from textpolicy.environments.dataset import Dataset, prompt_key
from textpolicy.environments.environment import (
    Environment,
    GeneratedTasks,
    NotedSplit,
    TaskSplit,
    attach_from,
)
from textpolicy.environments.right_answers import right_answer_reader
from textpolicy.errors import ConfigError, TaskError, UnreadableError
from textpolicy.types import Message, Task
from textpolicy.untrusted.files import read_utf8

# Draws among which examples of different problems are looked for, for each example.
_DRAWS_PER_EXAMPLE = 64
_TEXT_FILES = (".txt", ".md")
_LONGEST_NAME = 1024


def read_system(text_or_file: str | None) -> str | None:
    """Return the system message: the content of the file with this name, or the text itself."""
    path = system_file(text_or_file)
    if path is None:
        return text_or_file or None
    try:
        return read_utf8(path).strip()
    except UnreadableError as error:
        raise ConfigError(
            f"the system message cannot be read: {error}. Give --system a text, or the name of a "
            "text file"
        ) from error


def system_messages(text_or_file: str | None) -> list[Message]:
    """Return the system message with which a conversation begins, or no message without one."""
    system = read_system(text_or_file)
    return [{"role": "system", "content": system}] if system else []


def system_file(text_or_file: str | None) -> Path | None:
    """Return the file that holds the system message, or None if the message itself is given."""
    text = text_or_file or ""
    if not text or len(text) > _LONGEST_NAME or "\n" in text or "\0" in text:
        return None
    path = Path(text).expanduser()
    # One word such as rules.txt means a file, also if there is none.
    is_name = len(text.split()) == 1 and path.suffix in _TEXT_FILES
    try:
        return path if is_name or path.is_file() else None
    except OSError:
        return None  # A part of the text is too long for the name of a file.


def with_preamble(
    environment: Environment,
    *,
    system: str | None = None,
    few_shot: int = 0,
    gold_column: str | None = None,
    seed: int,
) -> Environment:
    """Return an environment whose tasks have a system message and solved examples before them.

    The examples are the first `few_shot` training tasks in the order of `seed`, without the task
    itself. No held-out task is an example.
    """
    if system is None and not few_shot:
        return environment
    if environment.agent is not None:
        raise ConfigError(
            f"the agent {environment.name} writes its conversations itself, so it would not read a "
            "system message or examples of few_shot. Write them in the agent's file"
        )
    tasks = environment.tasks
    problem_of = tasks.problem if isinstance(tasks, GeneratedTasks) else _problem_of
    solve = _Solver(environment, gold_column)
    examples = _draw_examples(environment, few_shot, seed, problem_of) if few_shot else []
    messages = {problem_of(one): solve.messages(one) for one in examples}
    first: list[Message] = [{"role": "system", "content": system}] if system else []

    def add(task: Task) -> Task:
        others = [shot for problem, shot in messages.items() if problem != problem_of(task)]
        shots = [message for shot in others[:few_shot] for message in shot]
        return replace(task, preamble=[*first, *shots])

    if isinstance(tasks, Dataset):
        changed = replace(
            tasks, train=list(map(add, tasks.train)), held_out=list(map(add, tasks.held_out))
        )
        return replace(environment, tasks=changed)
    return replace(environment, tasks=TasksWithPreamble(source=tasks, add=add))


@dataclass(frozen=True, kw_only=True)
class TasksWithPreamble:
    """The tasks of another split, each changed by `add`."""

    source: TaskSplit
    add: Callable[[Task], Task]

    def stream(self, seed: int) -> Iterator[Task]:
        return map(self.add, self.source.stream(seed))

    def heldout(self, number: int) -> list[Task]:
        return list(map(self.add, self.source.heldout(number)))

    def attach(self, task: Task) -> Task:
        # The task has its preamble already.
        return attach_from(self.source, task)

    @property
    def split_note(self) -> str:
        return self.source.split_note if isinstance(self.source, NotedSplit) else ""


@dataclass(frozen=True)
class _Solver:
    """Writes a task and its right answer as messages."""

    environment: Environment
    gold_column: str | None

    def messages(self, task: Task) -> Sequence[Message]:
        prompt = task.prompt
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        answer = {"role": "assistant", "content": self._gold(task)}
        return [*(one for one in asked if one["role"] != "system"), answer]

    def _gold(self, task: Task) -> str:
        gold = right_answer_reader(self.environment, self.gold_column)(task.example)
        if gold is not None:
            return gold
        raise TaskError(
            f"few_shot needs the right answer of each task as one text, and {task.id} has none. "
            f"The columns are {list(task.example)}. Name the column of right answers "
            "(--gold-column), write a function gold(example) that returns a text, or leave out "
            "few_shot"
        )


def _problem_of(task: Task) -> str:
    return prompt_key(task.prompt)


def _draw_examples(
    environment: Environment, count: int, seed: int, problem_of: Callable[[Task], str]
) -> list[Task]:
    """Return one more training task than `count`, of different problems."""
    found: dict[str, Task] = {}
    for task in islice(environment.stream(seed), _DRAWS_PER_EXAMPLE * (count + 1)):
        if task.env is not None:
            raise TaskError(
                f"few_shot is {count}, but a task of environment {environment.name} is a "
                "conversation of several turns, which one right answer does not show. Leave out "
                "few_shot, or write examples into the system message"
            )
        found.setdefault(problem_of(task), task)
        if len(found) > count:
            return list(found.values())
    raise TaskError(
        f"few_shot is {count}, which needs {count + 1} different training tasks, so that no task "
        f"is its own example. {environment.name} has {len(found)}. Lower few_shot, or add rows"
    )
