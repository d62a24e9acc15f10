"""Decode all rows of some prompts, with replies to the rows that have ended."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any

import mlx.nn as nn

from textpolicy.generation.decoding_batch import DecodingRow, StopRule
from textpolicy.generation.engine import Engine, NewestVersion
from textpolicy.generation.sampling import random_keys
from textpolicy.types import Sampling


@dataclass(frozen=True, slots=True)
class LateReply:
    """A reply that another thread still makes. `read` returns it, once the future is done."""

    future: Future[Any]
    read: Callable[[], list[int] | None]


RespondToRow = Callable[[DecodingRow], list[int] | LateReply | None]
"""Takes a row that ended; returns the tokens of the reply to it, or None to end its episode."""


def decode(
    model: nn.Module,
    prompts: Sequence[list[int]],
    *,
    n: int,
    sampling: Sampling,
    stop: StopRule,
    seed: int,
    first: int = 0,
    max_rows: int | None,
    batched: bool = True,
    launch_ahead: bool = False,
    newest_version: NewestVersion | None = None,
    respond: RespondToRow | None = None,
    on_ended: Callable[[int], None] = lambda number: None,
) -> list[list[DecodingRow]]:
    """Return `n` finished rows for each prompt, in an engine of their own.

    `first` is the place of the first prompt among all prompts of `seed`, on which the draws depend.
    With `respond`, a row that ended continues with its next turn, and the last turn of each row is
    returned. See `Engine` for `newest_version`. `on_ended` is called after each step with the
    number of rows that have ended in it.
    """
    engine = Engine(
        model,
        max_rows=max_rows,
        batched=batched,
        launch_ahead=launch_ahead,
        newest_version=newest_version,
    )
    keys = random_keys(seed, [(first + p, m) for p in range(len(prompts)) for m in range(n)])
    groups = [
        [
            DecodingRow(
                context=prompt,
                sampling=sampling,
                stop=stop,
                key=keys[p * n + m],
                prompt=p,
                member=m,
                may_continue=respond is not None,
            )
            for m in range(n)
        ]
        for p, prompt in enumerate(prompts)
    ]
    for group in groups:
        engine.submit(group)
    conversation = _Conversation(engine, groups, respond)
    while engine.can_step or conversation.late:
        ended = conversation.receive(wait=not engine.can_step)
        ended += conversation.begin_turns(engine.step())
        on_ended(ended)
    return groups


class _Conversation:
    """The replies to the rows of an engine. While a reply is made, other rows decode."""

    def __init__(
        self, engine: Engine, groups: list[list[DecodingRow]], respond: RespondToRow | None
    ) -> None:
        self._engine = engine
        self._groups = groups
        self._respond = respond
        self._arrived: SimpleQueue[DecodingRow] = SimpleQueue()
        self.late: dict[DecodingRow, LateReply] = {}

    def begin_turns(self, ended: Sequence[DecodingRow]) -> int:
        """Ask for replies to rows that have just ended; return how many are over."""
        if self._respond is None:
            return len(ended)
        over = 0
        for row in ended:
            reply = self._respond(row)
            if isinstance(reply, LateReply):
                self._engine.hold(row)
                self.late[row] = reply
                reply.future.add_done_callback(partial(self._put, row))
            else:
                over += self._continue(row, reply)
        return over

    def receive(self, *, wait: bool) -> int:
        """Pass on the late replies that are there; return how many rows are over."""
        over = 0
        while self.late and (wait or not self._arrived.empty()):
            row = self._arrived.get()
            reply = self.late.pop(row).read()
            if reply is None:
                self._engine.cancel(row)
            over += self._continue(row, reply)
            wait = False
        return over

    def _put(self, row: DecodingRow, future: Future[Any]) -> None:
        self._arrived.put(row)

    def _continue(self, row: DecodingRow, reply: list[int] | None) -> bool:
        if reply is not None:
            self._groups[row.prompt][row.member] = self._engine.reply(row, reply)
        return reply is None
