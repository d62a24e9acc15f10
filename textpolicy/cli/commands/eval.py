"""`textpolicy eval`: evaluate a model on held-out tasks, with and without its adapters."""

from argparse import Namespace
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

from textpolicy.adapters.container import AdapterContainer
from textpolicy.cli.answer import Answer, table
from textpolicy.cli.flags import configured
from textpolicy.config import TrainConfig
from textpolicy.environments import Environment
from textpolicy.evaluation import Comparison, Evaluation, HeldOut, TaskDifference, compare, evaluate
from textpolicy.experiment.assembly import apply_thread_option, dtype_of, sampling_of
from textpolicy.experiment.tasks import find_task, with_environment
from textpolicy.generation.mlx_generation import load_model
from textpolicy.generation.policy import ModelPolicy
from textpolicy.rewards import Rewards, scorer_of
from textpolicy.tracking.console import terminal_safe

_MAX_SHOWN_CHARACTERS = 200


def run(options: Namespace) -> Answer:
    config = configured(TrainConfig(), options)
    apply_thread_option(config.model)
    others = [with_environment(config.task, name) for name in config.evaluation.envs or ()]
    tasks = [find_task(task) for task in (config.task, *others)]
    start, dtype = config.adapter.start, dtype_of(config.model)
    model, tokenizer = load_model(config.model.name, start, dtype=dtype)
    results = [
        _evaluate(config, ModelPolicy(model, tokenizer, sampling_of(config, task[0])), *task)
        for task in tasks
    ]
    own, *rest = map(_data, results)
    lines = [line for one in results for line in _lines(one, config.model.name, options.show)]
    return Answer(data=own | {"others": rest}, text="\n".join(lines))


@dataclass(frozen=True, kw_only=True)
class _Result:
    """Evaluations of the base model, and of the model with adapters if there are any."""

    heldout: HeldOut
    evaluations: dict[str, Evaluation]

    @property
    def comparison(self) -> Comparison | None:
        if "adapter" not in self.evaluations:
            return None
        return compare(self.heldout.tasks, self.evaluations["base"], self.evaluations["adapter"])


def _evaluate(
    config: TrainConfig, policy: ModelPolicy, environment: Environment, rewards: Rewards
) -> _Result:
    settings, adapters = config.evaluation, AdapterContainer.of(policy.model)
    with scorer_of(rewards) as scorer:
        heldout = HeldOut(
            name=environment.name,
            tasks=environment.heldout(settings.count),
            scorer=scorer,
            max_tokens=policy.sampling.max_tokens,
        )

        def evaluate_now() -> Evaluation:
            return evaluate(
                policy,
                heldout,
                samples=settings.samples,
                temperature=settings.temperature,
                good=settings.good,
            )

        with adapters.disabled() if adapters else nullcontext():
            evaluations = {"base": evaluate_now()}
        if adapters:
            evaluations["adapter"] = evaluate_now()
    return _Result(heldout=heldout, evaluations=evaluations)


def _data(result: _Result) -> dict[str, Any]:
    evaluations, comparison = result.evaluations, result.comparison
    rewards = {name: asdict(evaluation.greedy_reward) for name, evaluation in evaluations.items()}
    metrics = {name: evaluation.metrics("") for name, evaluation in evaluations.items()}
    data = {"env": result.heldout.name, **rewards, "metrics": metrics}
    return data | ({"comparison": asdict(comparison)} if comparison else {})


def _lines(result: _Result, model: str, show: int) -> list[str]:
    heldout, comparison = result.heldout, result.comparison
    return [
        f"{model} on {len(heldout.tasks)} held-out tasks of {heldout.name}",
        *_reward_lines(result.evaluations),
        *(_comparison_lines(comparison, show) if comparison else []),
    ]


def _reward_lines(evaluations: dict[str, Evaluation]) -> list[str]:
    rows: list[tuple[str, str]] = []
    for name, evaluation in evaluations.items():
        sampled = {k: v for k, v in evaluation.metrics("").items() if "@" in k}
        more = "".join(f"  {metric} {value:.3f}" for metric, value in sampled.items())
        rows.append((name, f"greedy {evaluation.greedy_reward}{more}"))
    return [table(rows)]


def _comparison_lines(comparison: Comparison, show: int) -> list[str]:
    lines = [
        f"gain  {comparison} (paired bootstrap over tasks)",
        f"{comparison.better} tasks better, {comparison.worse} worse, "
        f"{comparison.count - len(comparison.differences)} equal",
    ]
    for difference in comparison.differences[:show]:
        lines += ["", *_difference_lines(difference)]
    return lines


def _difference_lines(difference: TaskDifference) -> list[str]:
    rows = [
        ("prompt", difference.prompt),
        (f"base {difference.reward_before:g}", difference.before),
        (f"adapter {difference.reward_after:g}", difference.after),
    ]
    return [table([(name, _cut(text)) for name, text in rows])]


def _cut(text: str) -> str:
    line = terminal_safe(text).replace("\n", "\\n")
    limit = _MAX_SHOWN_CHARACTERS
    return line if len(line) <= limit else f"{line[:limit]} ..."
