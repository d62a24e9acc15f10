"""Collecting rollouts: a policy answers tasks or plays their environments, and rewards score."""

from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any

from textpolicy.activity import doing
from textpolicy.environments.chat import prompt_text
from textpolicy.environments.environment import sum_turn_rewards
from textpolicy.environments.episode_values import StepResult, check_step_result, open_episode
from textpolicy.environments.faults import environment_errors
from textpolicy.errors import ConfigError, RewardError, TaskError, TextPolicyError
from textpolicy.rewards import RewardLike, Sample, Scorer, Verdict, append_completion, scorer_of
from textpolicy.rewards.scorer import BackgroundScorer
from textpolicy.rewards.thoughts import thought_fields
from textpolicy.rollout.agent_play import AgentEpisode, play_agents
from textpolicy.rollout.segments import join_completions
from textpolicy.types import (
    Completion,
    ConversingPolicy,
    Message,
    Policy,
    Prompt,
    Rollout,
    RolloutGroup,
    Sampling,
    Segment,
    StopReason,
    Task,
    TextEnv,
    Turn,
)
from textpolicy.user_code import WaitingCalls, keep_process_state

OnFault = Callable[[TextPolicyError], None]
"""Takes the error of an environment; raises it if it must end the run."""
_OPENINGS = WaitingCalls()
"""Opens and closes environments, and remembers from one generation to the next if they wait."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Draws:
    """What the draws of a call depend on: the seed, and the place of each rollout."""

    group_size: int
    seed: int
    first: int

    @property
    def arguments(self) -> dict[str, int]:
        """The arguments of a policy. Without `first` if it is 0, which all policies accept."""
        first = {"first": self.first} if self.first else {}
        return {"n": self.group_size, "seed": self.seed, **first}


def collect(
    tasks: Sequence[Task],
    policy: Policy,
    reward: RewardLike,
    *,
    group_size: int,
    seed: int,
    max_turns: int = 64,
    first: int = 0,
) -> list[RolloutGroup]:
    """Return `group_size` scored rollouts for each task, in the order of the tasks.

    The same `seed` gives the same rollouts. `first` is the place of the first task among all tasks
    of that seed: calls with parts of the tasks return what one call with all of them returns. All
    rows of all tasks decode together. If rewards run
    in processes of their own and no task has an environment, the rewards score answers while the
    policy still decodes other answers. While an environment waits for something, other rows decode
    and other environments are called. An episode ends after `max_turns`, even if its environment
    continues.
    """
    draws = _Draws(group_size=group_size, seed=seed, first=first)
    with scorer_of(reward) as scorer:
        scorer.prepare([task.example for task in tasks])
        episodic = any(task.env for task in tasks)
        if any(task.agent for task in tasks):
            unscored = _play_agents(tasks, policy, draws, scorer)
            verdicts = _score(scorer, tasks, unscored)
        elif not episodic and scorer.can_overlap_decoding and isinstance(policy, ConversingPolicy):
            unscored, verdicts = _answer_and_score(tasks, policy, draws, scorer)
        else:
            unscored = _play(tasks, policy, draws, max_turns, scorer.count_fault)
            verdicts = _score(scorer, tasks, unscored)
    remaining = iter(verdicts)
    return [
        RolloutGroup(task=task, rollouts=[_rollout(one, next(remaining)) for one in group])
        for task, group in zip(tasks, unscored, strict=True)
    ]


class Episode:
    """A new environment that is played for one rollout of a task.

    `cut_off` is True if a limit ended the episode and not the environment. A completion that
    reached `max_tokens` is the last one. An environment that fails ends the episode too: `fault`
    says how, and `on_fault` is called with it.
    """

    def __init__(self, task: Task, max_turns: int, on_fault: OnFault) -> None:
        self.turns: list[Turn] = []
        self.cut_off = True
        self.metrics: dict[str, float] = {}
        self.fault: TextPolicyError | None = None
        self._task = task
        self._max_turns = max_turns
        self._on_fault = on_fault
        self._env: TextEnv | None = None
        with self._noting_faults("the start of an environment", "reset"):
            assert task.env is not None
            self._env = task.env()
            prompt, _ = open_episode(self._env, task.seed)
            if prompt != task.prompt:
                raise TaskError(
                    f"the environment opens with {prompt!r:.60} for seed {task.seed}, but the "
                    f"task's prompt is {task.prompt!r:.60}; make reset(seed=...) give the same "
                    "start for the same seed"
                )

    def respond(self, completion: Completion) -> Sequence[Message] | None:
        """Return the messages that the environment replies, or None if the episode is over."""
        if self.fault or self._env is None:
            return None
        where = f"turn {len(self.turns) + 1}, on {completion.text!r:.60}"
        with self._noting_faults("a step of an environment", where):
            return self._record(completion, check_step_result(self._env.step(completion.text)))
        return None

    def _record(self, completion: Completion, step: StepResult) -> Sequence[Message] | None:
        unfinished = completion.stop_reason is StopReason.LENGTH
        full = len(self.turns) + 1 >= self._max_turns
        self.cut_off = not step.terminated and (step.truncated or unfinished or full)
        turn = Turn(completion=completion.text, reward=step.reward, replies=step.messages)
        self.turns.append(turn)
        metrics = {**step.metrics, "turns": float(len(self.turns))}
        self.metrics = {f"env/{name}": value for name, value in metrics.items()}
        if step.terminated or self.cut_off:
            return None
        # If no further call comes, the context had no room for another answer.
        self.cut_off = True
        return step.messages

    def close(self) -> None:
        """Close the environment."""
        if self._env is not None:
            with self._noting_faults("closing an environment", "close"):
                self._env.close()

    @contextmanager
    def _noting_faults(self, what: str, where: str) -> Generator[None, None, None]:
        """Keep the first error inside the blocks as the episode's fault."""
        try:
            with doing(what), environment_errors(self._task.id, where), keep_process_state():
                yield
        except (TaskError, RewardError) as error:
            if self.fault is None:
                self.fault = error
                self._on_fault(error)


@dataclass(frozen=True, slots=True)
class _UnscoredRollout:
    """The completions of one rollout, one for each turn, and the episode if there is one."""

    completions: Sequence[Completion]
    episode: Episode | AgentEpisode | None = None

    @property
    def segments(self) -> list[Segment]:
        """The token sequences: one, unless an agent has rewritten its conversation."""
        segments = join_completions(self.completions)
        if isinstance(self.episode, AgentEpisode):
            return segments or [Segment(tokens=[], mask=[], logprobs=[])]
        if len(segments) > 1:
            raise ValueError("a policy changed the tokens of an earlier turn of an episode")
        return segments

    @property
    def sampling(self) -> Sampling:
        episode = self.episode
        return episode.sampling if isinstance(episode, AgentEpisode) else self.last.sampling

    @property
    def version(self) -> int:
        episode = self.episode
        if isinstance(episode, AgentEpisode):
            return episode.version
        return min(completion.version for completion in self.completions)

    @property
    def last(self) -> Completion:
        return self.completions[-1]

    @property
    def turns(self) -> Sequence[Turn]:
        return self.episode.turns if self.episode else ()

    @property
    def fault(self) -> TextPolicyError | None:
        return self.episode.fault if self.episode else None

    @property
    def stop_reason(self) -> StopReason:
        if self.episode is not None and self.episode.cut_off:
            return StopReason.LENGTH
        return self.last.stop_reason if self.completions else StopReason.CANCELLED


def _answer_and_score(
    tasks: Sequence[Task], policy: ConversingPolicy, draws: _Draws, scorer: Scorer
) -> tuple[list[list[_UnscoredRollout]], list[Verdict]]:
    """Return the rollouts of each task, and their verdicts in the order of tasks and members."""
    with closing(BackgroundScorer[tuple[int, int]](scorer)) as background:

        def score(t: int, member: int, completion: Completion) -> None:
            background.add((t, member), _sample(tasks[t], _UnscoredRollout([completion])))

        groups = policy.converse([task.asked for task in tasks], score, **draws.arguments)
        verdicts = background.verdicts()
    unscored = [[_UnscoredRollout(turns) for turns in group] for group in groups]
    return unscored, [verdicts[t, m] for t, group in enumerate(groups) for m in range(len(group))]


def _play_agents(
    tasks: Sequence[Task], policy: Policy, draws: _Draws, scorer: Scorer
) -> list[list[_UnscoredRollout]]:
    """Return the rollouts of each task, which its agent has played."""
    groups = play_agents(
        tasks,
        policy,
        group_size=draws.group_size,
        seed=draws.seed,
        first=draws.first,
        needs_score=sum_turn_rewards in scorer.rewards.members,
        on_fault=scorer.count_fault,
    )
    return [[_UnscoredRollout(one.completions, one) for one in group] for group in groups]


def _play(
    tasks: Sequence[Task],
    policy: Policy,
    draws: _Draws,
    max_turns: int,
    on_fault: OnFault,
) -> list[list[_UnscoredRollout]]:
    """Return the rollouts of each task: an episode if it has an environment, else one answer."""
    prompts = [task.asked for task in tasks]
    episodic = next((task for task in tasks if task.env), None)
    if episodic is None:
        answers = policy.generate(prompts, **draws.arguments)
        return [[_UnscoredRollout([completion]) for completion in group] for group in answers]
    if not isinstance(policy, ConversingPolicy):
        raise ConfigError(
            f"{type(policy).__name__} has no method converse, but task {episodic.id!r} is played "
            "in turns with its environment; give the policy the method converse of "
            "textpolicy.types.ConversingPolicy"
        )
    lock, members = Lock(), range(draws.group_size)

    def on_fault_in_thread(fault: TextPolicyError) -> None:
        with lock:
            on_fault(fault)

    start = partial(Episode, max_turns=max_turns, on_fault=on_fault_in_thread)
    played = [task for task in tasks if task.env]
    opened = iter(_call_all([partial(start, task) for task in played for _ in members]))
    episodes: list[list[Episode | None]] = [
        [next(opened) if task.env else None for _ in members] for task in tasks
    ]

    def respond(t: int, member: int, completion: Completion) -> Sequence[Message] | None:
        episode = episodes[t][member]
        return episode.respond(completion) if episode else None

    groups = policy.converse(prompts, respond, **draws.arguments)
    _call_all([episode.close for group in episodes for episode in group if episode])
    return [
        [_UnscoredRollout(turns, episode) for turns, episode in zip(group, members, strict=True)]
        for group, members in zip(groups, episodes, strict=True)
    ]


def _call_all(functions: Sequence[Callable[[], Any]]) -> list[Any]:
    """Return the results of all calls. After an error that ends the run, no further call begins."""
    futures: list[Future[Any]] = []
    try:
        for function in functions:
            futures.append(_OPENINGS.start(function))
            if futures[-1].done():
                futures[-1].result()
        return [future.result() for future in futures]
    finally:
        _OPENINGS.drop()


def _score(
    scorer: Scorer, tasks: Sequence[Task], unscored: Sequence[Sequence[_UnscoredRollout]]
) -> list[Verdict]:
    """Return a verdict for each rollout. Rewards do not see episodes whose environment failed."""
    rollouts = [(task, one) for task, group in zip(tasks, unscored, strict=True) for one in group]
    whole = [_sample(task, one) for task, one in rollouts if one.fault is None]
    scored = iter(scorer.score(whole))
    return [
        scorer.verdict_of_fault(one.fault) if one.fault else next(scored) for _, one in rollouts
    ]


def _sample(task: Task, unscored: _UnscoredRollout) -> Sample:
    return Sample(
        id=task.id,
        prompt=prompt_text(task.prompt),
        completion=unscored.last.text,
        example=task.example,
        context=_context(task.asked, unscored),
    )


def _context(prompt: Prompt, unscored: _UnscoredRollout) -> Mapping[str, Any]:
    """Return the values of `textpolicy.rewards.CONTEXT_FIELDS`, as types that need no mlx."""
    return {
        "tokens": [token for turn in unscored.completions for token in turn.tokens],
        "stop_reason": unscored.stop_reason.value,
        "messages": _messages(prompt, unscored),
        "turns": [turn.text for turn in unscored.completions],
        "turn_rewards": [turn.reward for turn in unscored.turns] or [0.0],
        **thought_fields(
            unscored.last.text,
            in_thought=unscored.last.in_thought,
            thought=unscored.last.thought,
            answer=unscored.last.answer,
        ),
    }


def _messages(prompt: Prompt, unscored: _UnscoredRollout) -> Sequence[Message]:
    """Return the conversation with the last completion."""
    if isinstance(unscored.episode, AgentEpisode) and (messages := unscored.episode.messages):
        return messages
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*prompt]
    for turn in unscored.turns[:-1]:
        messages = [*append_completion(messages, turn.completion), *turn.replies]
    return append_completion(messages, unscored.last.text)


def _rollout(unscored: _UnscoredRollout, verdict: Verdict) -> Rollout:
    """Return the rollout with its reward. An agent that failed at once has no tokens."""
    episode, last = unscored.episode, unscored.completions[-1] if unscored.completions else None
    first, *later = unscored.segments
    reward_metrics = {f"rewards/{name}": value for name, value in verdict.metrics.items()}
    return Rollout(
        tokens=first.tokens,
        mask=first.mask,
        logprobs=first.logprobs,
        versions=first.versions,
        later=tuple(later),
        completion=last.text if last else "",
        reward=verdict.value,
        rewards=verdict.parts,
        metrics=reward_metrics | (episode.metrics if episode else {}),
        stop_reason=unscored.stop_reason,
        sampling=unscored.sampling,
        version=unscored.version,
        error=verdict.error,
        turns=unscored.turns,
    )
