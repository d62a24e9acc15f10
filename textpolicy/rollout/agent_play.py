"""Rollouts of agents: they ask the policy through a server, and every answer is kept as sampled."""

import secrets
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from queue import SimpleQueue
from threading import Event
from typing import Any, Protocol, runtime_checkable

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from textpolicy.activity import doing
from textpolicy.errors import ConfigError, TaskError, TextPolicyError
from textpolicy.rollout.segments import join_completions
from textpolicy.serving.conversations import read_messages
from textpolicy.serving.encoding import PromptEncoder
from textpolicy.serving.engine_queue import ServedEngine
from textpolicy.serving.exchange import Exchange
from textpolicy.serving.generation_request import GenerationRequest
from textpolicy.serving.refusal import RefusalError
from textpolicy.types import (
    Agent,
    AgentOutcome,
    AgentPlay,
    Completion,
    Message,
    Policy,
    Sampling,
    StopReason,
    Task,
    Turn,
)

_MODEL = "policy"
_PLAIN = Sampling()
"""What a request asks for that names no temperature and no truncation."""
_TURN_LIMIT = "turn_limit_exceeded"
_LIMITS = (_TURN_LIMIT, "context_length_exceeded")
_Messages = Sequence[Mapping[str, Any]]


@runtime_checkable
class ServablePolicy(Policy, Protocol):
    """A policy of a model in this process, from which a server can sample."""

    model: nn.Module
    tokenizer: TokenizerWrapper
    sampling: Sampling
    allow_special_tokens: bool
    chat_template_kwargs: dict[str, Any]

    def sampled_model(self) -> nn.Module:
        """Return the model that computes the tokens, which may be a copy with merged weights."""
        ...

    @property
    def newest_version(self) -> Callable[[], int] | None:
        """What the engine calls before each step, to take new adapters between tokens."""
        ...


@dataclass(eq=False)
class AgentEpisode:
    """One rollout of an agent: its answers in the order in which they ended, and its score.

    The server's thread writes it while the agent plays, and others read it afterwards.
    """

    task: Task
    place: str
    """The seed of the call, the task and the member: all that the draws depend on, but prompts."""
    sampling: Sampling
    first_version: int
    """The version that the policy had when the agents began."""
    key: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    exchanges: list[Exchange] = field(default_factory=list[Exchange])
    asked: int = 0
    seen: dict[bytes, int] = field(default_factory=dict[bytes, int])
    limited: bool = False
    """Whether a request was refused because of a limit on turns or tokens."""
    other_sampling: bool = False
    """Whether a request asked for another sampling than that of the run."""
    score: float | None = None
    fault: TextPolicyError | None = None

    @property
    def completions(self) -> list[Completion]:
        """The answers, with the sampling of the run."""
        return [_completion(one, self.sampling) for one in self.exchanges]

    @property
    def version(self) -> int:
        """The oldest version that an answer was sampled with."""
        return min((one.version for one in self.exchanges), default=self.first_version)

    @property
    def cut_off(self) -> bool:
        """Whether a limit on turns or tokens ended the rollout."""
        return self.limited or (
            bool(self.exchanges) and self.exchanges[-1].finish_reason == "length"
        )

    @property
    def turns(self) -> list[Turn]:
        """The answers with what the agent replied. The last one has the score as its reward."""
        last = len(self.exchanges) - 1
        return [
            Turn(
                completion=one.text,
                reward=self.score or 0.0 if number == last else 0.0,
                replies=[] if number == last else _replies(one, self.exchanges[number + 1]),
            )
            for number, one in enumerate(self.exchanges)
        ]

    @property
    def messages(self) -> list[Message]:
        """The last conversation with its answer; empty if the agent asks without messages."""
        last = self.exchanges[-1]
        if not last.messages:
            return []
        return [*map(_as_text, last.messages), {"role": "assistant", "content": last.text}]

    @property
    def metrics(self) -> dict[str, float]:
        return {
            "env/turns": float(len(self.exchanges)),
            "rollout/segments": float(len(join_completions(self.completions))),
            "rollout/other_sampling": float(self.other_sampling),
        }


def play_agents(
    tasks: Sequence[Task],
    policy: Policy,
    *,
    group_size: int,
    seed: int,
    first: int = 0,
    needs_score: bool,
    on_fault: Callable[[TextPolicyError], None],
) -> list[list[AgentEpisode]]:
    """Return `group_size` rollouts of each task, all of which are played by one agent.

    `first` is the place of the first task among all tasks of `seed`, on which the draws depend.
    The thread that calls this decodes for all agents until the last one has ended. `on_fault` is
    called with each failure of an agent, and may raise to end all of them. With `needs_score`, an
    agent that gives no score has failed.
    """
    agent = _agent_of(tasks)
    if not isinstance(policy, ServablePolicy):
        raise ConfigError(
            f"{type(policy).__name__} has no model that a server could sample from, but task "
            f"{tasks[0].id!r} is played by an agent; use a ModelPolicy"
        )
    groups = [
        [
            AgentEpisode(task, f"{seed}/{t}/{member}", policy.sampling, policy.version)
            for member in range(group_size)
        ]
        for t, task in enumerate(tasks, first)
    ]
    episodes = [one for group in groups for one in group]
    _Hall(agent, policy, episodes, needs_score, on_fault).play()
    return groups


class _Hall:
    """A server with the policy, and the rollouts that are played there at the same time."""

    def __init__(
        self,
        agent: Agent,
        policy: ServablePolicy,
        episodes: Sequence[AgentEpisode],
        needs_score: bool,
        on_fault: Callable[[TextPolicyError], None],
    ) -> None:
        self._agent = agent
        self._policy = policy
        self._episodes = episodes
        self._needs_score = needs_score
        self._on_fault = on_fault
        self._by_key = {one.key: one for one in episodes}
        self._served = ServedEngine(policy.sampled_model(), policy.tokenizer)
        self._encoder = PromptEncoder(
            policy.model,
            policy.tokenizer,
            max_tokens=policy.sampling.max_tokens,
            most_tokens=policy.sampling.max_tokens,
            allow_special_tokens=policy.allow_special_tokens,
            chat_template_kwargs=policy.chat_template_kwargs,
        )
        self._ended: SimpleQueue[tuple[int, AgentOutcome]] = SimpleQueue()
        self._stopped = Event()

    def play(self) -> None:
        """Decode for all agents until the last one has ended."""
        try:
            from textpolicy.serving.app import create_app
            from textpolicy.serving.server import running_server
        except ImportError as error:
            raise ConfigError(
                "agents ask the policy through a server: pip install 'textpolicy[serve]'"
            ) from error
        policy = self._policy
        self._served.put(
            _MODEL,
            policy.sampled_model(),
            version=policy.version,
            newest_version=policy.newest_version,
        )
        app = create_app(
            self._served,
            owner_of=self._by_key.get,
            on_exchange=_keep,
            prepare=self._prepare,
            on_refusal=_note_limit,
            encoder=self._encoder,
        )
        with (
            running_server(app) as address,
            ThreadPoolExecutor(1, thread_name_prefix="agents") as thread,
            doing("playing agents", len(self._episodes)) as work,
        ):
            playing = thread.submit(self._play_all, address)
            playing.add_done_callback(lambda _: self._served.wake())
            try:
                self._served.run(until=lambda: self._receive(work.advance, playing.done()))
                playing.result()
            finally:
                self._stopped.set()
                self._agent.wake()

    # The thread of the agents' processes

    def _play_all(self, address: str) -> None:
        plays = [
            AgentPlay(
                prompt=one.task.prompt,
                example=one.task.example,
                base_url=f"{address}/v1",
                api_key=one.key,
                model=_MODEL,
            )
            for one in self._episodes
        ]
        self._agent.play(plays, self._end, self._stopped.is_set)

    def _end(self, number: int, outcome: AgentOutcome) -> None:
        # What the agent has left behind may ask no more.
        self._by_key.pop(self._episodes[number].key)
        self._ended.put((number, outcome))
        self._served.wake()

    # The thread that decodes

    def _receive(self, advance: Callable[[int], None], over: bool) -> bool:
        """Take the outcomes that have arrived, and return `over`."""
        while not self._ended.empty():
            number, outcome = self._ended.get()
            self._take(self._episodes[number], outcome)
            advance(1)
        return over

    def _take(self, episode: AgentEpisode, outcome: AgentOutcome) -> None:
        episode.score, error = outcome.score, outcome.error
        if error and episode.limited and episode.exchanges:
            # The limit ended the rollout: no code has failed.
            episode.score = error = None
        elif not error and not episode.exchanges:
            error = "the agent ended without an answer of the policy"
        elif not error and outcome.score is None and self._needs_score:
            error = (
                "the agent gave no score. Return a number from its function, print a last line "
                'such as {"score": 1.0}, or name a reward function'
            )
        if error:
            episode.fault = TaskError(f"agent, task {episode.task.id}: {error}")
            self._on_fault(episode.fault)

    # The thread of the prompts

    def _prepare(
        self,
        episode: AgentEpisode,
        messages: _Messages,
        tools: _Messages,
        request: GenerationRequest,
    ) -> GenerationRequest:
        """Return the request with the run's sampling, tokens as sampled, and a seed of its own."""
        answers = len(request.prompts) * request.n
        if episode.asked + answers > self._agent.max_turns:
            raise RefusalError(
                f"this rollout has asked for {episode.asked} answers, and at most "
                f"{self._agent.max_turns} are allowed. Set MAX_TURNS in the agent's file",
                code=_TURN_LIMIT,
            )
        prompts, most = list(request.prompts), request.sampling.max_tokens
        if messages and (tokens := self._continued(episode, messages, tools)):
            prompts, most = [tokens], self._encoder.limit(most, len(tokens), "messages")
        episode.asked += answers
        asked, own = request.sampling, episode.sampling
        plain = replace(asked, max_tokens=_PLAIN.max_tokens, stop=()) == _PLAIN
        episode.other_sampling |= not plain
        return replace(
            request,
            model=_MODEL,
            prompts=prompts,
            sampling=replace(
                own,
                max_tokens=most,
                stop=tuple(dict.fromkeys((*own.stop, *asked.stop))),
            ),
            seed=_seed_of(episode, prompts),
        )

    def _continued(
        self, episode: AgentEpisode, messages: _Messages, tools: _Messages
    ) -> list[int] | None:
        """Return the tokens of an earlier answer and of the messages after it, if there is one.

        The answer must be in the conversation as it was given, and only replies may follow. The
        chat template alone could tokenize the answer in another way than it was sampled.
        """
        before = [one for one in episode.exchanges if _continues(messages, tools, one)]
        if not before:
            return None
        last = max(before, key=lambda one: len(one.messages))
        replies = [*map(dict, messages[len(last.messages) + 1 :])]
        tokens = self._encoder.encode_reply(replies, last.tokens[-1])
        return None if tokens is None else last.prompt_tokens + last.tokens + tokens


def _agent_of(tasks: Sequence[Task]) -> Agent:
    agents = {id(task.agent): task.agent for task in tasks}
    (agent, *others) = agents.values()
    if agent is None or others:
        raise ConfigError(
            "the tasks are played by several agents, or some by none; collect the tasks of one "
            "agent at a time"
        )
    return agent


def _note_limit(episode: AgentEpisode, refusal: RefusalError) -> None:
    episode.limited |= refusal.code in _LIMITS


def _keep(exchange: Exchange) -> None:
    # What a client has not waited for was no part of the agent's play.
    if exchange.finish_reason != "cancelled" and exchange.tokens:
        exchange.owner.exchanges.append(exchange)


def _seed_of(episode: AgentEpisode, prompts: Sequence[Sequence[int]]) -> int:
    """Return a seed that depends on the rollout, on the prompts, and on how often they were asked.

    So the draws do not depend on the order in which requests arrive.
    """
    digest = blake2b(f"{episode.place}/{prompts}".encode(), digest_size=8).digest()
    count = episode.seen[digest] = episode.seen.get(digest, -1) + 1
    return int.from_bytes(digest, "big") + count


def _continues(messages: _Messages, tools: _Messages, before: Exchange) -> bool:
    """Return whether the messages are those of an exchange, its answer, and replies to it."""
    count = len(before.messages)
    replies = messages[count + 1 :]
    return (
        0 < count < len(messages)
        and list(messages[:count]) == list(before.messages)
        and list(tools) == list(before.tools)
        and _visible(messages[count]) == _visible(read_messages([before.message])[0])
        and bool(replies)
        and all(one["role"] in ("user", "tool") for one in replies)
    )


def _visible(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a client has to send back of an answer: its text and its calls."""
    return {name: message.get(name) for name in ("role", "content", "tool_calls")}


def _completion(exchange: Exchange, sampling: Sampling) -> Completion:
    length = exchange.finish_reason == "length"
    return Completion(
        prompt_tokens=list(exchange.prompt_tokens),
        tokens=list(exchange.tokens),
        logprobs=list(exchange.logprobs),
        text=exchange.text,
        stop_reason=StopReason.LENGTH if length else StopReason.STOP_TOKEN,
        sampling=sampling,
        version=exchange.version,
        versions=list(exchange.versions),
    )


def _replies(exchange: Exchange, after: Exchange) -> list[Message]:
    """Return the messages that the next request adds to the conversation of this one."""
    count = len(exchange.messages)
    if not count or list(after.messages[:count]) != list(exchange.messages):
        return []
    return list(map(_as_text, after.messages[count + 1 :]))


def _as_text(message: Mapping[str, Any]) -> Message:
    return {"role": str(message["role"]), "content": str(message["content"])}
