"""Tasks to rollout groups: sample, score, keep exactly what was sampled."""

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from textpolicy.rewards import Sample, Scoring, Verdict, conversation, scorer_of
from textpolicy.types import Completion, Policy, Prompt, Rollout, RolloutGroup, Task


def collect(
    tasks: Sequence[Task],
    policy: Policy,
    reward: Scoring,
    *,
    group_size: int,
    seed: int,
) -> list[RolloutGroup]:
    """`group_size` scored rollouts for each task, in the tasks' order; repeatable by `seed`."""
    with scorer_of(reward) as scorer:
        scorer.prepare([task.example for task in tasks])
        completions_G = policy.generate([task.prompt for task in tasks], n=group_size, seed=seed)
        pairs = [
            (task, completion)
            for task, members in zip(tasks, completions_G, strict=True)
            for completion in members
        ]
        verdicts = scorer.score([_sample(task, completion) for task, completion in pairs])
    rollouts = iter(
        _rollout(completion, verdict)
        for (_, completion), verdict in zip(pairs, verdicts, strict=True)
    )
    return [
        RolloutGroup(task=task, rollouts=list(islice(rollouts, len(members))))
        for task, members in zip(tasks, completions_G, strict=True)
    ]


def prompt_text(prompt: Prompt) -> str:
    """What a reward sees as the prompt: the string, or the last message's content."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def _sample(task: Task, completion: Completion) -> Sample:
    return Sample(
        id=task.id,
        prompt=prompt_text(task.prompt),
        completion=completion.text,
        example=task.example,
        context=_context(task.prompt, completion),
    )


def _context(prompt: Prompt, completion: Completion) -> Mapping[str, Any]:
    """The fields of `textpolicy.rewards.contract.CONTEXT`, in types that need no mlx to unpack."""
    given = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return {
        "tokens": completion.tokens,
        "stop_reason": completion.stop_reason.value,
        "messages": conversation(given, completion.text),
        "turns": [completion.text],
    }


def _rollout(completion: Completion, verdict: Verdict) -> Rollout:
    given, drawn = len(completion.prompt_tokens), len(completion.tokens)
    return Rollout(
        tokens=completion.prompt_tokens + completion.tokens,
        mask=[False] * given + [True] * drawn,
        logprobs=[0.0] * given + completion.logprobs,
        completion=completion.text,
        reward=verdict.value,
        rewards=verdict.parts,
        metrics={f"rewards/{name}": value for name, value in verdict.metrics.items()},
        stop_reason=completion.stop_reason,
        sampling=completion.sampling,
        version=completion.version,
        error=verdict.error,
    )
