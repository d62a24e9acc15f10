"""Tasks to rollout groups: sample, score, keep exactly what was sampled."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from textpolicy.environments.single_turn import prompt_text
from textpolicy.errors import ConfigError
from textpolicy.rewards import RewardLike, Sample, Scorer, Verdict, append_completion, scorer_of
from textpolicy.rewards.background_scorer import BackgroundScorer
from textpolicy.rollout.episode import Episode
from textpolicy.types import (
    Completion,
    ConversingPolicy,
    Policy,
    Prompt,
    Rollout,
    RolloutGroup,
    StopReason,
    Task,
    Turn,
)

_MAX_EPISODE_TURNS = 64


def collect(
    tasks: Sequence[Task],
    policy: Policy,
    reward: RewardLike,
    *,
    group_size: int,
    seed: int,
    max_turns: int = _MAX_EPISODE_TURNS,
) -> list[RolloutGroup]:
    """`group_size` scored rollouts for each task, in the tasks' order; repeatable by `seed`.

    Tasks without an environment are answered once, all in one wide batch; where rewards run in
    processes of their own, an answer is scored while others are written. No episode takes more
    than `max_turns`, whatever its environment says.
    """
    with scorer_of(reward) as scorer:
        scorer.prepare([task.example for task in tasks])
        answered = [t for t, task in enumerate(tasks) if task.env is None]
        played = [t for t, task in enumerate(tasks) if task.env is not None]
        if not played and scorer.can_overlap_decoding and isinstance(policy, ConversingPolicy):
            said, verdicts = _answer_and_score(tasks, policy, scorer, group_size, seed)
        else:
            said = _answer(tasks, answered, policy, group_size, seed)
            said |= _play(tasks, played, policy, group_size, seed, max_turns)
            everything = [(tasks[t], one) for t in range(len(tasks)) for one in said[t]]
            verdicts = iter(scorer.score([_sample(task, one) for task, one in everything]))
    return [
        RolloutGroup(task=task, rollouts=[_rollout(one, next(verdicts)) for one in said[t]])
        for t, task in enumerate(tasks)
    ]


@dataclass(frozen=True, slots=True)
class _Said:
    """All that one rollout's policy said, and the episode it was said in, if there was one."""

    completions: Sequence[Completion]
    episode: Episode | None = None

    @property
    def last(self) -> Completion:
        return self.completions[-1]

    @property
    def turns(self) -> Sequence[Turn]:
        return self.episode.turns if self.episode else ()


def _answer(
    tasks: Sequence[Task], chosen: Sequence[int], policy: Policy, group_size: int, seed: int
) -> dict[int, list[_Said]]:
    if not chosen:
        return {}
    groups = policy.generate([tasks[t].prompt for t in chosen], n=group_size, seed=seed)
    return {t: [_Said([one]) for one in group] for t, group in zip(chosen, groups, strict=True)}


def _answer_and_score(
    tasks: Sequence[Task], policy: ConversingPolicy, scorer: Scorer, group_size: int, seed: int
) -> tuple[dict[int, list[_Said]], Iterator[Verdict]]:
    """The verdicts come in the order of tasks and their rows."""
    with closing(BackgroundScorer[tuple[int, int]](scorer)) as early:

        def score(t: int, member: int, said: Completion) -> None:
            early.add((t, member), _sample(tasks[t], _Said([said])))

        groups = policy.converse([task.prompt for task in tasks], score, n=group_size, seed=seed)
        found = early.verdicts()
    said = {t: [_Said(turns) for turns in group] for t, group in enumerate(groups)}
    return said, (found[t, member] for t, group in said.items() for member in range(len(group)))


def _play(
    tasks: Sequence[Task],
    chosen: Sequence[int],
    policy: Policy,
    group_size: int,
    seed: int,
    max_turns: int,
) -> dict[int, list[_Said]]:
    """All episodes at once: each goes on as soon as its environment has answered."""
    if not chosen:
        return {}
    if not isinstance(policy, ConversingPolicy):
        raise ConfigError(
            f"{type(policy).__name__} has no method converse, which task {tasks[chosen[0]].id!r} "
            "needs to be played in its environment; see textpolicy.types.ConversingPolicy"
        )
    episodes = [[Episode(tasks[t], max_turns) for _ in range(group_size)] for t in chosen]
    groups = policy.converse(
        [tasks[t].prompt for t in chosen],
        lambda prompt, member, said: episodes[prompt][member].respond(said),
        n=group_size,
        seed=seed,
    )
    for episode in (one for members in episodes for one in members):
        episode.close()
    return {
        t: [_Said(turns, episode) for turns, episode in zip(group, members, strict=True)]
        for t, group, members in zip(chosen, groups, episodes, strict=True)
    }


def _sample(task: Task, said: _Said) -> Sample:
    return Sample(
        id=task.id,
        prompt=prompt_text(task.prompt),
        completion=said.last.text,
        example=task.example,
        context=_context(task.prompt, said),
    )


def _context(prompt: Prompt, said: _Said) -> Mapping[str, Any]:
    """The fields of `textpolicy.rewards.CONTEXT_FIELDS`, in types that need no mlx to unpack."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*prompt]
    for turn in said.turns[:-1]:
        messages = [*append_completion(messages, turn.completion), *turn.replies]
    return {
        "tokens": [token for turn in said.completions for token in turn.tokens],
        "stop_reason": _stop_reason(said).value,
        "messages": append_completion(messages, said.last.text),
        "turns": [turn.text for turn in said.completions],
        "turn_rewards": [turn.reward for turn in said.turns] or [0.0],
    }


def _stop_reason(said: _Said) -> StopReason:
    cut = said.episode is not None and said.episode.cut
    return StopReason.LENGTH if cut else said.last.stop_reason


def _rollout(said: _Said, verdict: Verdict) -> Rollout:
    """The tokens of all turns as they were read and drawn: those of the last hold all others."""
    last = said.last
    tokens = last.prompt_tokens + last.tokens
    mask = [False] * len(tokens)
    logprobs = [0.0] * len(tokens)
    for turn in said.completions:
        start, end = len(turn.prompt_tokens), len(turn.prompt_tokens) + len(turn.tokens)
        if tokens[:end] != turn.prompt_tokens + turn.tokens:
            raise ValueError("a policy changed the tokens of an earlier turn of an episode")
        mask[start:end] = [True] * len(turn.tokens)
        logprobs[start:end] = turn.logprobs
    counted = said.episode.metrics if said.episode else {}
    return Rollout(
        tokens=tokens,
        mask=mask,
        logprobs=logprobs,
        completion=last.text,
        reward=verdict.value,
        rewards=verdict.parts,
        metrics={f"rewards/{name}": value for name, value in verdict.metrics.items()} | counted,
        stop_reason=_stop_reason(said),
        sampling=last.sampling,
        version=last.version,
        error=verdict.error,
        turns=said.turns,
    )
