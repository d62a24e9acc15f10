"""StreamedTasks: tasks from rows that are read while they are used, for data of any size."""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from hashlib import blake2b
from itertools import count, islice
from random import Random

from textpolicy.activity import doing
from textpolicy.environments.data_files import DataRow, LocatedRow
from textpolicy.environments.dataset import WritePrompt, prompt_key, task_of_row
from textpolicy.environments.template import Template
from textpolicy.errors import DataError
from textpolicy.types import Prompt, Task
from textpolicy.untrusted.bounds import MAX_BUFFER_BYTES

BUFFER_ROWS = 10_000
"""Rows among which the next task is drawn."""
_HELD_OUT_SHARE = 0.1
# Tasks from which a Gymnasium environment of the rows draws.
_DRAWN_FROM = 256


class StreamedTasks:
    """Tasks from rows that `read` yields from their beginning, once for each epoch.

    A tenth of the prompts is held out by their hashes, or `held_out` are the held-out tasks and
    all other prompts are trained on. A buffer of `BUFFER_ROWS` rows shuffles the training tasks.
    """

    def __init__(
        self,
        name: str,
        read: Callable[[], Iterator[LocatedRow]],
        prompt: Template | WritePrompt | None = None,
        *,
        held_out: Sequence[Task] | None = None,
    ) -> None:
        self.name = name
        self._read = read
        self._prompt = prompt
        self._given = None if held_out is None else {prompt_key(task.prompt) for task in held_out}
        self._found = {} if held_out is None else {prompt_key(t.prompt): t for t in held_out}
        self._unread = self._tasks() if held_out is None else iter(())

    def stream(self, seed: int) -> Iterator[Task]:
        """Yield training tasks without end. The seed decides the order of each epoch."""
        for epoch in count():
            order = self._shuffled(Random(f"{self.name}/{seed}/{epoch}"))
            first = next(order, None)
            if first is None:
                raise DataError(
                    f"the rows of {self.name} have no training task: every prompt is held out. Add "
                    "rows, or leave out --data-stream"
                )
            yield first
            yield from order

    def heldout(self, number: int) -> list[Task]:
        """Return the first `number` held-out tasks in the order of the rows, of different prompts.

        Rows are read only until so many are found.
        """
        with doing("reading rows for the held-out tasks"):
            while len(self._found) < number and (task := next(self._unread, None)):
                if self._is_held_out(task):
                    self._found.setdefault(prompt_key(task.prompt), task)
        if not self._found:
            raise DataError(
                f"none of the rows of {self.name} is held out: of streamed rows, a tenth is, which "
                "their hashes choose. Leave out --data-stream, or name held-out rows (--eval-data)"
            )
        return list(islice(self._found.values(), number))

    def draw(self, rng: Random) -> tuple[Prompt, DataRow]:
        """Return the prompt and the row of a random one of the first training tasks."""
        task = rng.choice(self._first)
        return task.prompt, task.example

    @cached_property
    def _first(self) -> list[Task]:
        return list(islice(self._training_tasks(), _DRAWN_FROM))

    def _tasks(self) -> Iterator[Task]:
        for number, (where, row) in enumerate(self._read(), start=1):
            yield task_of_row(row, self._prompt, f"{self.name}/{number}", where)

    def _training_tasks(self) -> Iterator[Task]:
        return (task for task in self._tasks() if not self._is_held_out(task))

    def _is_held_out(self, task: Task) -> bool:
        key = prompt_key(task.prompt)
        if self._given is not None:
            return key in self._given
        digest = blake2b(key.encode(), digest_size=8).digest()
        return int.from_bytes(digest) < _HELD_OUT_SHARE * 2**64

    def _shuffled(self, rng: Random) -> Iterator[Task]:
        """Yield each training task once, drawn from those that are in the buffer."""
        buffer: list[tuple[int, Task]] = []
        size = 0
        for task in self._training_tasks():
            buffer.append((len(str(task.example)), task))
            size += buffer[-1][0]
            while len(buffer) > BUFFER_ROWS or size > MAX_BUFFER_BYTES:
                drawn = rng.randrange(len(buffer))
                buffer[drawn], buffer[-1] = buffer[-1], buffer[drawn]
                size -= buffer[-1][0]
                yield buffer.pop()[1]
        rng.shuffle(buffer)
        yield from (task for _, task in buffer)
