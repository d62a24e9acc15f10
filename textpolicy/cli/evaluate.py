"""`textpolicy eval`: what a model earns on held-out tasks, and what its adapters change."""

from argparse import Namespace
from contextlib import nullcontext
from dataclasses import asdict

from textpolicy.adapters.container import AdapterContainer
from textpolicy.cli.assembly import dtype_of, sampling_of
from textpolicy.cli.flags import configured
from textpolicy.cli.report import Report, table
from textpolicy.cli.tasks import find_task
from textpolicy.cli.threads import use_threads
from textpolicy.config import TrainConfig
from textpolicy.environments import Environment
from textpolicy.evaluation import Comparison, Difference, Evaluation, HeldOut, compare, evaluate
from textpolicy.generation.mlx_generation import load_model
from textpolicy.generation.policy import ModelPolicy
from textpolicy.rewards import Rewards, scorer_of
from textpolicy.tracking.console import visible

_WIDTH = 200
"""Characters of a prompt or an answer that are shown."""


def run(options: Namespace) -> Report:
    config = configured(TrainConfig(), options)
    use_threads(config.model)
    environment, rewards = find_task(config.task)
    heldout, evaluations = _evaluate(config, environment, rewards)
    data = {"env": environment.name} | {
        name: asdict(evaluation.score) for name, evaluation in evaluations.items()
    }
    data["metrics"] = {name: one.metrics("") for name, one in evaluations.items()}
    lines = [
        f"{config.model.name} on {len(heldout.tasks)} held-out tasks of {environment.name}",
        *_scores(evaluations),
    ]
    if "adapter" in evaluations:
        comparison = compare(heldout.tasks, evaluations["base"], evaluations["adapter"])
        data["comparison"] = asdict(comparison)
        lines += _compared(comparison, options.show)
    return Report(data=data, text="\n".join(lines))


def _evaluate(
    config: TrainConfig, environment: Environment, rewards: Rewards
) -> tuple[HeldOut, dict[str, Evaluation]]:
    """The base model's answers, and with adapters theirs, to the same tasks."""
    sampling, asked = sampling_of(config, environment), config.evaluation
    dtype = dtype_of(config.model)
    model, tokenizer = load_model(config.model.name, config.adapter.start, dtype=dtype)
    policy = ModelPolicy(model, tokenizer, sampling)
    adapters = AdapterContainer.of(model)
    with scorer_of(rewards) as scorer:
        heldout = HeldOut(
            name=environment.name,
            tasks=environment.heldout(asked.count),
            scorer=scorer,
            max_tokens=sampling.max_tokens,
        )

        def answered() -> Evaluation:
            return evaluate(
                policy,
                heldout,
                samples=asked.samples,
                temperature=asked.temperature,
                good=asked.good,
            )

        with adapters.disabled() if adapters else nullcontext():
            evaluations = {"base": answered()}
        if adapters:
            evaluations["adapter"] = answered()
    return heldout, evaluations


def _scores(evaluations: dict[str, Evaluation]) -> list[str]:
    rows: list[tuple[str, str]] = []
    for name, evaluation in evaluations.items():
        sampled = {k: v for k, v in evaluation.metrics("").items() if "@" in k}
        more = "".join(f"  {metric} {value:.3f}" for metric, value in sampled.items())
        rows.append((name, f"greedy {evaluation.score}{more}"))
    return [table(rows)]


def _compared(comparison: Comparison, show: int) -> list[str]:
    lines = [
        f"gain  {comparison} (paired bootstrap over tasks)",
        f"{comparison.better} tasks better, {comparison.worse} worse, "
        f"{comparison.count - len(comparison.differences)} equal",
    ]
    for difference in comparison.differences[:show]:
        lines += ["", *_shown(difference)]
    return lines


def _shown(difference: Difference) -> list[str]:
    rows = [
        ("prompt", difference.prompt),
        (f"base {difference.reward_before:g}", difference.before),
        (f"adapter {difference.reward_after:g}", difference.after),
    ]
    return [table([(name, _cut(text)) for name, text in rows])]


def _cut(text: str) -> str:
    shown = visible(text).replace("\n", "\\n")
    return shown if len(shown) <= _WIDTH else f"{shown[:_WIDTH]} ..."
