"""`AgentProcesses`: processes in which agents play rollouts, each killed at its time limit."""

import os
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import wait
from typing import Any

from textpolicy.types import AgentOutcome, AgentPlay
from textpolicy.user_code.agent_worker import AgentFile, serve_agents
from textpolicy.user_code.killable_process import ForgedAnswerError, KillableProcess

DEFAULT_SECONDS = 300.0
"""How long a rollout of an agent may take, unless the run says otherwise."""
DEFAULT_PROCESSES = min(16, 4 * (os.cpu_count() or 1))
"""How many rollouts are played at once. Agents mostly wait for the policy."""
_STARTUP_SECONDS = 60.0
_MAX_EXCERPT = 80

OnEnd = Callable[[int, AgentOutcome], None]


@dataclass(eq=False)
class _Player:
    """One process, the rollout that it plays, and when this rollout must have ended."""

    process: KillableProcess
    deadline: float
    ready: bool = False
    number: int | None = None


class AgentProcesses:
    """Plays rollouts of one agent, at most `processes` at once, for at most `seconds` each.

    A function is called in processes that stay for the next rollouts; a program has a new process
    for each rollout. All processes end with this object, or when `close` is called.
    """

    def __init__(
        self,
        agent: AgentFile,
        *,
        max_turns: int,
        processes: int = DEFAULT_PROCESSES,
        seconds: float = DEFAULT_SECONDS,
    ) -> None:
        self.agent = agent
        self.max_turns = max_turns
        self.processes = processes
        self.seconds = seconds
        self._players: list[_Player] = []
        self._waiting: deque[tuple[int, AgentPlay]] = deque()
        self._on_end: OnEnd = lambda number, outcome: None
        self._woken, self._wakes = os.pipe()
        weakref.finalize(self, _close_all, self._woken, self._wakes)

    def play(
        self,
        plays: Sequence[AgentPlay],
        on_end: OnEnd,
        stopped: Callable[[], bool] = lambda: False,
        /,
    ) -> None:
        """Play all rollouts. Call `on_end` with the number of each rollout that has ended.

        If `stopped` is true after a call of `wake`, kill all processes and return.
        """
        self._waiting, self._on_end = deque(enumerate(plays)), on_end
        while missing := len(self._waiting) + sum(one.number is not None for one in self._players):
            while len(self._players) < min(self.processes, missing):
                self._players.append(self._start())
            for player in self._players:
                if self._waiting and player.ready and player.number is None:
                    self._give(player, *self._waiting.popleft())
            self._wait()
            if stopped():
                self.close()
                return
            for player in list(self._players):
                self._look_at(player)

    def wake(self) -> None:
        """Let `play` in another thread look at its `stopped` again."""
        os.write(self._wakes, b"\0")

    def close(self) -> None:
        """Kill all processes, with everything that they have started."""
        while self._players:
            self._players.pop().process.kill()

    def _start(self) -> _Player:
        process = KillableProcess(f"{serve_agents.__module__}:{serve_agents.__name__}")
        process.send(self.agent)
        return _Player(process, time.monotonic() + _STARTUP_SECONDS)

    def _give(self, player: _Player, number: int, play: AgentPlay) -> None:
        player.number, player.deadline = number, time.monotonic() + self.seconds
        # A mapping of another kind may not arrive in the other process.
        prompt = play.prompt if isinstance(play.prompt, str) else [dict(m) for m in play.prompt]
        fields = asdict(replace(play, prompt="", example={}))
        player.process.send(fields | {"prompt": prompt, "example": dict(play.example)})

    def _wait(self) -> None:
        """Wait until a process has written something or is late, or until `wake` is called."""
        busy = [one for one in self._players if one.number is not None or not one.ready]
        ends: list[Any] = [self._woken, *(one.process.socket for one in self._players)]
        ends += [one.process.output for one in self._players if one.process.output_is_open]
        late = min((player.deadline for player in busy), default=0.0)
        if self._woken in wait(ends, max(0.0, late - time.monotonic())):
            os.read(self._woken, 1 << 10)

    def _look_at(self, player: _Player) -> None:
        """Take what a process has to say, and end it if it is late or has ended itself."""
        try:
            for message in player.process.read_messages():
                self._take(player, message)
        except ForgedAnswerError as error:
            self._fail(player, f"the agent's process wrote {error} where a score was expected")
        except EOFError:
            self._fail(player, f"the agent's process {player.process.kill_and_describe()}")
        is_idle = player.ready and player.number is None
        if player in self._players and not is_idle and time.monotonic() > player.deadline:
            seconds = self.seconds if player.ready else _STARTUP_SECONDS
            self._fail(
                player,
                f"the agent took longer than {seconds:g} s and was stopped, with all that it had "
                "started",
            )

    def _take(self, player: _Player, message: Mapping[str, Any]) -> None:
        number = player.number
        match message:
            case {"ready": True} if not player.ready:
                player.ready = True
            case {"score": None | int() | float() as score} if number is not None:
                self._end(player, number, AgentOutcome(score=score))
            case {"error": str(error)} if number is not None:
                self._end(player, number, AgentOutcome(error=error))
            case _:
                raise ForgedAnswerError(repr(message)[:_MAX_EXCERPT])

    def _end(self, player: _Player, number: int, outcome: AgentOutcome) -> None:
        player.number = None
        if self.agent.function is None:
            # The program may have left other processes behind.
            self._drop(player)
        self._on_end(number, outcome)

    def _fail(self, player: _Player, error: str) -> None:
        """End a process, and with it the rollout that it plays or for which it was started."""
        self._drop(player)
        number = player.number
        if number is None and not player.ready and self._waiting:
            number, _ = self._waiting.popleft()
        if number is not None:
            self._on_end(number, AgentOutcome(error=error))

    def _drop(self, player: _Player) -> None:
        if player in self._players:
            self._players.remove(player)
        player.process.kill()


def _close_all(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
