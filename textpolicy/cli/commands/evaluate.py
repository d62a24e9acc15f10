"""`textpolicy eval`: what a model earns on held-out tasks, and what its adapters change."""

from argparse import Namespace
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

from textpolicy.adapters.container import AdapterContainer
from textpolicy.cli.answer import Report, table
from textpolicy.cli.flags import configured
from textpolicy.config import TrainConfig
from textpolicy.environments import Environment
from textpolicy.evaluation import Comparison, Evaluation, HeldOut, TaskDifference, compare, evaluate
from textpolicy.experiment.assembly import dtype_of, sampling_of
from textpolicy.experiment.tasks import elsewhere, find_task
from textpolicy.experiment.threads import use_threads
from textpolicy.generation.mlx_generation import load_model
from textpolicy.generation.policy import ModelPolicy
from textpolicy.rewards import Rewards, scorer_of
from textpolicy.tracking.console import terminal_safe

_WIDTH = 200
"""Characters of a prompt or an answer that are shown."""


def run(options: Namespace) -> Report:
    config = configured(TrainConfig(), options)
    use_threads(config.model)
    others = [elsewhere(config.task, name) for name in config.evaluation.envs or ()]
    tasks = [find_task(task) for task in (config.task, *others)]
    start, dtype = config.adapter.start, dtype_of(config.model)
    model, tokenizer = load_model(config.model.name, start, dtype=dtype)
    found = [
        _evaluate(config, ModelPolicy(model, tokenizer, sampling_of(config, task[0])), *task)
        for task in tasks
    ]
    own, *rest = map(_data, found)
    lines = [line for one in found for line in _lines(one, config.model.name, options.show)]
    return Report(data=own | {"others": rest}, text="\n".join(lines))


@dataclass(frozen=True, kw_only=True)
class _Found:
    """The base model's answers to the same tasks, and with adapters theirs."""

    heldout: HeldOut
    evaluations: dict[str, Evaluation]

    @property
    def comparison(self) -> Comparison | None:
        if "adapter" not in self.evaluations:
            return None
        return compare(self.heldout.tasks, self.evaluations["base"], self.evaluations["adapter"])


def _evaluate(
    config: TrainConfig, policy: ModelPolicy, environment: Environment, rewards: Rewards
) -> _Found:
    asked, adapters = config.evaluation, AdapterContainer.of(policy.model)
    with scorer_of(rewards) as scorer:
        heldout = HeldOut(
            name=environment.name,
            tasks=environment.heldout(asked.count),
            scorer=scorer,
            max_tokens=policy.sampling.max_tokens,
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
    return _Found(heldout=heldout, evaluations=evaluations)


def _data(found: _Found) -> dict[str, Any]:
    evaluations, comparison = found.evaluations, found.comparison
    scores = {name: asdict(evaluation.greedy_reward) for name, evaluation in evaluations.items()}
    metrics = {name: evaluation.metrics("") for name, evaluation in evaluations.items()}
    data = {"env": found.heldout.name, **scores, "metrics": metrics}
    return data | ({"comparison": asdict(comparison)} if comparison else {})


def _lines(found: _Found, model: str, show: int) -> list[str]:
    heldout, comparison = found.heldout, found.comparison
    return [
        f"{model} on {len(heldout.tasks)} held-out tasks of {heldout.name}",
        *_scores(found.evaluations),
        *(_compared(comparison, show) if comparison else []),
    ]


def _scores(evaluations: dict[str, Evaluation]) -> list[str]:
    rows: list[tuple[str, str]] = []
    for name, evaluation in evaluations.items():
        sampled = {k: v for k, v in evaluation.metrics("").items() if "@" in k}
        more = "".join(f"  {metric} {value:.3f}" for metric, value in sampled.items())
        rows.append((name, f"greedy {evaluation.greedy_reward}{more}"))
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


def _shown(difference: TaskDifference) -> list[str]:
    rows = [
        ("prompt", difference.prompt),
        (f"base {difference.reward_before:g}", difference.before),
        (f"adapter {difference.reward_after:g}", difference.after),
    ]
    return [table([(name, _cut(text)) for name, text in rows])]


def _cut(text: str) -> str:
    shown = terminal_safe(text).replace("\n", "\\n")
    return shown if len(shown) <= _WIDTH else f"{shown[:_WIDTH]} ..."
