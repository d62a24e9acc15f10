"""Tasks to rollout groups: sample, score, keep exactly what was sampled."""

from collections.abc import Sequence

from textpolicy.environments.single_turn import prompt_text
from textpolicy.errors import ConfigError
from textpolicy.rewards import score
from textpolicy.rollout.episode import Episode
from textpolicy.types import (
    Completion,
    ConversingPolicy,
    Policy,
    RewardFn,
    Rollout,
    RolloutGroup,
    StopReason,
    Task,
)

MAX_TURNS = 64


def collect(
    tasks: Sequence[Task],
    policy: Policy,
    reward: RewardFn | None,
    *,
    group_size: int,
    seed: int,
    max_turns: int = MAX_TURNS,
) -> list[RolloutGroup]:
    """`group_size` scored rollouts for each task, in the tasks' order; repeatable by `seed`.

    Without `reward`, a rollout is worth what its turns earned. No episode takes more than
    `max_turns`, whatever its environment says.
    """
    rollouts: dict[int, list[Rollout]] = {}
    answered = [t for t, task in enumerate(tasks) if task.env is None]
    played = [t for t, task in enumerate(tasks) if task.env is not None]
    if answered:
        if reward is None:
            raise ConfigError(
                f"task {tasks[answered[0]].id!r} has no environment, so nothing but a reward "
                "function can score it; reward is None"
            )
        prompts = [tasks[t].prompt for t in answered]
        completions = policy.generate(prompts, n=group_size, seed=seed)
        for t, members in zip(answered, completions, strict=True):
            rollouts[t] = [_answer(tasks[t], member, reward) for member in members]
    if played:
        groups = _play([tasks[t] for t in played], policy, reward, group_size, seed, max_turns)
        rollouts |= dict(zip(played, groups, strict=True))
    return [RolloutGroup(task=task, rollouts=rollouts[t]) for t, task in enumerate(tasks)]


def _answer(task: Task, said: Completion, reward: RewardFn) -> Rollout:
    return _rollout([said], reward=_score(task, said, reward))


def _score(task: Task, said: Completion, reward: RewardFn) -> float | None:
    return score(reward, prompt_text(task.prompt), said.text, task.example)


def _play(
    tasks: Sequence[Task],
    policy: Policy,
    reward: RewardFn | None,
    group_size: int,
    seed: int,
    max_turns: int,
) -> list[list[Rollout]]:
    """All episodes at once: each goes on as soon as its environment has answered."""
    if not isinstance(policy, ConversingPolicy):
        raise ConfigError(
            f"{type(policy).__name__} has no method converse, which task {tasks[0].id!r} needs to "
            "be played in its environment; see textpolicy.types.ConversingPolicy"
        )
    episodes = [[Episode(task, max_turns) for _ in range(group_size)] for task in tasks]
    turns_G_N = policy.converse(
        [task.prompt for task in tasks],
        lambda prompt, member, said: episodes[prompt][member].respond(said),
        n=group_size,
        seed=seed,
    )
    return [
        [_finish(task, episode, said, reward) for episode, said in zip(members, turns, strict=True)]
        for task, members, turns in zip(tasks, episodes, turns_G_N, strict=True)
    ]


def _finish(
    task: Task, episode: Episode, said: Sequence[Completion], reward: RewardFn | None
) -> Rollout:
    if not episode.over:
        episode.close()
    value = _score(task, said[-1], reward) if reward else episode.reward
    return _rollout(said, reward=value, episode=episode)


def _rollout(
    said: Sequence[Completion], *, reward: float | None, episode: Episode | None = None
) -> Rollout:
    """The tokens of all turns as they were read and drawn: those of the last hold all others."""
    last = said[-1]
    tokens = last.prompt_tokens + last.tokens
    mask = [False] * len(tokens)
    logprobs = [0.0] * len(tokens)
    for turn in said:
        start, end = len(turn.prompt_tokens), len(turn.prompt_tokens) + len(turn.tokens)
        if tokens[:end] != turn.prompt_tokens + turn.tokens:
            raise ValueError("a policy changed the tokens of an earlier turn of an episode")
        mask[start:end] = [True] * len(turn.tokens)
        logprobs[start:end] = turn.logprobs
    cut = episode is not None and episode.cut
    return Rollout(
        tokens=tokens,
        mask=mask,
        logprobs=logprobs,
        completion=last.text,
        reward=reward,
        stop_reason=StopReason.LENGTH if cut else last.stop_reason,
        sampling=last.sampling,
        version=last.version,
        turns=episode.turns if episode else (),
        metrics=episode.metrics if episode else {},
    )
