"""Collecting rollouts: a policy answers tasks or plays their environments, and rewards score."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from textpolicy.activity import doing
from textpolicy.environments.chat import prompt_text
from textpolicy.environments.environment import opening_prompt
from textpolicy.environments.faults import environment_errors
from textpolicy.environments.play import check_step_result
from textpolicy.errors import ConfigError, TaskError
from textpolicy.rewards import RewardLike, Sample, Scorer, Verdict, append_completion, scorer_of
from textpolicy.rewards.scorer import BackgroundScorer
from textpolicy.types import (
    Completion,
    ConversingPolicy,
    Message,
    Policy,
    Prompt,
    Rollout,
    RolloutGroup,
    StopReason,
    Task,
    Turn,
)


def collect(
    tasks: Sequence[Task],
    policy: Policy,
    reward: RewardLike,
    *,
    group_size: int,
    seed: int,
    max_turns: int = 64,
) -> list[RolloutGroup]:
    """Return `group_size` scored rollouts for each task, in the order of the tasks.

    The same `seed` gives the same rollouts. All rows of all tasks decode together. If rewards run
    in processes of their own and no task has an environment, the rewards score answers while the
    policy still decodes other answers. An episode ends after `max_turns`, even if its environment
    continues.
    """
    with scorer_of(reward) as scorer:
        scorer.prepare([task.example for task in tasks])
        episodic = any(task.env for task in tasks)
        if not episodic and scorer.can_overlap_decoding and isinstance(policy, ConversingPolicy):
            unscored, verdicts = _answer_and_score(tasks, policy, scorer, group_size, seed)
        else:
            unscored = _play(tasks, policy, group_size, seed, max_turns)
            groups = zip(tasks, unscored, strict=True)
            verdicts = scorer.score([_sample(task, one) for task, group in groups for one in group])
    remaining = iter(verdicts)
    return [
        RolloutGroup(task=task, rollouts=[_rollout(one, next(remaining)) for one in group])
        for task, group in zip(tasks, unscored, strict=True)
    ]


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
        with doing("the start of an environment"), environment_errors(task.id, "reset"):
            self._env = task.env()
            prompt = opening_prompt(*self._env.reset(seed=task.seed), task.id)
        if prompt != task.prompt:
            raise TaskError(
                f"the environment of task {task.id!r} opens with {prompt!r:.60} for seed "
                f"{task.seed}, but the task's prompt is {task.prompt!r:.60}; make reset(seed=...) "
                "give the same start for the same seed"
            )

    @doing("a step of an environment")
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

    @doing("closing an environment")
    def close(self) -> None:
        """Close the environment."""
        with environment_errors(self._task.id, "close"):
            self._env.close()


@dataclass(frozen=True, slots=True)
class _UnscoredRollout:
    """The completions of one rollout, one for each turn, and the episode if there is one."""

    completions: Sequence[Completion]
    episode: Episode | None = None

    @property
    def last(self) -> Completion:
        return self.completions[-1]

    @property
    def turns(self) -> Sequence[Turn]:
        return self.episode.turns if self.episode else ()

    @property
    def stop_reason(self) -> StopReason:
        cut_off = self.episode is not None and self.episode.cut_off
        return StopReason.LENGTH if cut_off else self.last.stop_reason


def _answer_and_score(
    tasks: Sequence[Task], policy: ConversingPolicy, scorer: Scorer, group_size: int, seed: int
) -> tuple[list[list[_UnscoredRollout]], list[Verdict]]:
    """Return the rollouts of each task, and their verdicts in the order of tasks and members."""
    with closing(BackgroundScorer[tuple[int, int]](scorer)) as background:

        def score(t: int, member: int, completion: Completion) -> None:
            background.add((t, member), _sample(tasks[t], _UnscoredRollout([completion])))

        groups = policy.converse([task.prompt for task in tasks], score, n=group_size, seed=seed)
        verdicts = background.verdicts()
    unscored = [[_UnscoredRollout(turns) for turns in group] for group in groups]
    return unscored, [verdicts[t, m] for t, group in enumerate(groups) for m in range(len(group))]


def _play(
    tasks: Sequence[Task], policy: Policy, group_size: int, seed: int, max_turns: int
) -> list[list[_UnscoredRollout]]:
    """Return the rollouts of each task: an episode if it has an environment, else one answer."""
    prompts = [task.prompt for task in tasks]
    episodic = next((task for task in tasks if task.env), None)
    if episodic is None:
        answers = policy.generate(prompts, n=group_size, seed=seed)
        return [[_UnscoredRollout([completion]) for completion in group] for group in answers]
    if not isinstance(policy, ConversingPolicy):
        raise ConfigError(
            f"{type(policy).__name__} has no method converse, but task {episodic.id!r} is played "
            "in turns with its environment; give the policy the method converse of "
            "textpolicy.types.ConversingPolicy"
        )
    episodes = [
        [Episode(task, max_turns) if task.env else None for _ in range(group_size)]
        for task in tasks
    ]

    def respond(t: int, member: int, completion: Completion) -> Sequence[Message] | None:
        episode = episodes[t][member]
        return episode.respond(completion) if episode else None

    groups = policy.converse(prompts, respond, n=group_size, seed=seed)
    for episode in (one for members in episodes for one in members if one):
        episode.close()
    return [
        [_UnscoredRollout(turns, episode) for turns, episode in zip(group, members, strict=True)]
        for group, members in zip(groups, episodes, strict=True)
    ]


def _sample(task: Task, unscored: _UnscoredRollout) -> Sample:
    return Sample(
        id=task.id,
        prompt=prompt_text(task.prompt),
        completion=unscored.last.text,
        example=task.example,
        context=_context(task.prompt, unscored),
    )


def _context(prompt: Prompt, unscored: _UnscoredRollout) -> Mapping[str, Any]:
    """Return the values of `textpolicy.rewards.CONTEXT_FIELDS`, as types that need no mlx."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*prompt]
    for turn in unscored.turns[:-1]:
        messages = [*append_completion(messages, turn.completion), *turn.replies]
    return {
        "tokens": [token for turn in unscored.completions for token in turn.tokens],
        "stop_reason": unscored.stop_reason.value,
        "messages": append_completion(messages, unscored.last.text),
        "turns": [turn.text for turn in unscored.completions],
        "turn_rewards": [turn.reward for turn in unscored.turns] or [0.0],
    }


def _rollout(unscored: _UnscoredRollout, verdict: Verdict) -> Rollout:
    """Return the rollout. The last completion's tokens contain the tokens of all turns before."""
    last = unscored.last
    tokens = last.prompt_tokens + last.tokens
    mask = [False] * len(tokens)
    logprobs = [0.0] * len(tokens)
    for turn in unscored.completions:
        start, end = len(turn.prompt_tokens), len(turn.prompt_tokens) + len(turn.tokens)
        if tokens[:end] != turn.prompt_tokens + turn.tokens:
            raise ValueError("a policy changed the tokens of an earlier turn of an episode")
        mask[start:end] = [True] * len(turn.tokens)
        logprobs[start:end] = turn.logprobs
    episode_metrics = unscored.episode.metrics if unscored.episode else {}
    reward_metrics = {f"rewards/{name}": value for name, value in verdict.metrics.items()}
    return Rollout(
        tokens=tokens,
        mask=mask,
        logprobs=logprobs,
        completion=last.text,
        reward=verdict.value,
        rewards=verdict.parts,
        metrics=reward_metrics | episode_metrics,
        stop_reason=unscored.stop_reason,
        sampling=last.sampling,
        version=last.version,
        error=verdict.error,
        turns=unscored.turns,
    )
