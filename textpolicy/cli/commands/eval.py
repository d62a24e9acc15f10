"""`textpolicy eval`: evaluate a model on held-out tasks, without and with adapters."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from textpolicy.cli.answer import Answer, table
from textpolicy.cli.models_of_runs import configured_to_sample
from textpolicy.cli.output import print_note
from textpolicy.cli.progress import showing_progress
from textpolicy.cli.shown_tasks import data_of_tasks, lines_of_answers, lines_of_differences
from textpolicy.cli.trained_rows import note_about_trained_rows
from textpolicy.cli.typed_flags import short_path
from textpolicy.config import TrainConfig
from textpolicy.config.train import TaskOptions
from textpolicy.device_sizes import sizes_of, using_sizes
from textpolicy.environments import Environment
from textpolicy.environments.right_answers import right_answer_reader
from textpolicy.errors import ConfigError
from textpolicy.evaluation import Comparison, Evaluation, HeldOut, compare, evaluate
from textpolicy.experiment.assembly import (
    dtype_of,
    load_sampled_model,
    sampling_of,
    template_arguments_of,
)
from textpolicy.experiment.model_defaults import with_model_defaults
from textpolicy.experiment.tasks import find_task, with_environment
from textpolicy.experiment.threads import apply_thread_option
from textpolicy.generation.mlx_generation import load_model
from textpolicy.generation.policy import ModelPolicy
from textpolicy.generation.thinking import describe_thinking
from textpolicy.rewards import Rewards, scorer_of
from textpolicy.runs import find_adapter
from textpolicy.runs.named_adapter import run_of_adapter
from textpolicy.tracking.named_numbers import shown_numbers
from textpolicy.types import Sampling

_BASE, _BEFORE, _AFTER = "base", "before", "adapter"
# A smaller share of answers without an end hardly changes a mean reward.
_MANY_CUT = 0.05


def run(options: Namespace) -> Answer:
    with showing_progress(print_note):
        return _run(options)


def _run(options: Namespace) -> Answer:
    config = configured_to_sample(options)
    before = _find_before(config, options)
    apply_thread_option(config.model)
    others = [with_environment(config.task, name) for name in config.evaluation.envs or ()]
    all_tasks = (config.task, *others)
    found = [find_task(task, config.run.seed, only_measured=True) for task in all_tasks]
    config = with_model_defaults(config)
    policies = _load_policies(config, before)
    with using_sizes(sizes_of(config.sizes)):
        results = [
            _evaluate(config, policies, task, *parts)
            for task, parts in zip(all_tasks, found, strict=True)
        ]
    compared = _describe_compared(config, before)
    own, *rest = map(_data, results)
    notes = [*_note_about_rows(config), *_note_about_start(config, before)]
    for adapter in filter(None, (before, config.adapter.start)):
        notes += note_about_trained_rows(adapter, results[0].heldout.tasks)
    lines = _lines(results[0], config.model.name, compared, options.show, notes)
    for one in results[1:]:
        lines += ["", *_lines(one, config.model.name, compared, options.show)]
    data = own | {"compared": compared, "notes": notes, "others": rest}
    return Answer(data=data, text="\n".join(lines))


def _find_before(config: TrainConfig, options: Namespace) -> Path | None:
    if options.before and config.adapter.start is None:
        raise ConfigError(
            f"--before {options.before} names the adapters to compare with, and no adapters are "
            "named to compare. Name them too: --adapter ADAPTER"
        )
    return find_adapter(options.before) if options.before else None


def _load_policies(config: TrainConfig, before: Path | None) -> dict[str, ModelPolicy]:
    """Return the policies that are measured, by name: one, or the two that are compared."""
    start = config.adapter.start
    # Each of two adapters may want the base quantized in its own way.
    model, tokenizer = (
        load_model(config.model.name, dtype=dtype_of(config.model))
        if before
        else load_sampled_model(config)
    )
    arguments = template_arguments_of(config.model, tokenizer)
    if thinking := describe_thinking(tokenizer, arguments):
        print_note(thinking)
    policy = ModelPolicy(
        model,
        tokenizer,
        Sampling(),
        allow_special_tokens=config.model.allow_special_tokens,
        chat_template_kwargs=arguments,
        merge_adapters=config.sampling.merge_adapters,
    )
    if start is None:
        return {_BASE: policy}
    if before is None:
        return {_BASE: policy.with_adapter(None), _AFTER: policy}
    return {_BEFORE: policy.with_adapter(before), _AFTER: policy.with_adapter(start)}


def _describe_compared(config: TrainConfig, before: Path | None) -> dict[str, str]:
    """Return what each of the two names stands for, if two are compared."""
    if config.adapter.start is None:
        return {}
    first = {_BEFORE: short_path(before)} if before else {_BASE: "the base model"}
    return first | {_AFTER: short_path(config.adapter.start)}


def _note_about_start(config: TrainConfig, before: Path | None) -> list[str]:
    """Say which adapters a run has begun with, because the base is not what it has changed."""
    adapter = config.adapter.start
    run = run_of_adapter(adapter) if adapter and not before else None
    began = run.read_settings().get("adapter", {}).get("start") if run else None
    if run is None or not isinstance(began, str):
        return []
    return [
        f"The run {short_path(run.path)} began with {short_path(Path(began))}, and is compared "
        f"with the base model. To see what the run has changed, add --before "
        f"{short_path(Path(began))}"
    ]


def _note_about_rows(config: TrainConfig) -> list[str]:
    data = config.task.data
    if data is None or config.task.eval_data is not None:
        return []
    return [
        f"These tasks are the tenth of the prompts of {data} that training leaves out. If nothing "
        f"was trained on these rows, --eval-data {data} measures every row"
    ]


@dataclass(frozen=True, kw_only=True)
class _Result:
    """The evaluations of one model, or of two that are compared, by name."""

    measured: str
    asked: int
    heldout: HeldOut
    evaluations: Mapping[str, Evaluation]
    comparison: Comparison | None


def _evaluate(
    config: TrainConfig,
    policies: Mapping[str, ModelPolicy],
    task: TaskOptions,
    environment: Environment,
    rewards: Rewards,
) -> _Result:
    settings = config.evaluation
    with closing(environment), scorer_of(rewards) as scorer:
        heldout = HeldOut(
            name=Path(task.eval_data).stem if task.eval_data and not task.env else environment.name,
            tasks=environment.heldout(settings.count),
            scorer=scorer,
            max_tokens=sampling_of(config, environment).max_tokens,
            split_note=environment.split_note,
            gold=right_answer_reader(environment, task.gold_column),
        )
        evaluations = {
            name: evaluate(
                policy,
                heldout,
                samples=settings.samples,
                temperature=settings.temperature,
                good=settings.good,
            )
            for name, policy in policies.items()
        }
    one, *other = evaluations.values()
    return _Result(
        measured=_describe_measured(task, heldout, settings.count),
        asked=settings.count,
        heldout=heldout,
        evaluations=evaluations,
        comparison=compare(heldout.tasks, one, *other) if other else None,
    )


def _describe_measured(task: TaskOptions, heldout: HeldOut, count: int) -> str:
    """Return which tasks were measured, and how many, by the names that the user gave."""
    number = len(heldout.tasks)
    tasks = f"the first {number}" if number == count else str(number)
    if task.eval_data:
        read_by = f", as tasks of {heldout.name}" if task.env else ""
        return f"{tasks} tasks of {_short_address(task.eval_data)}{read_by}"
    named = _short_address(task.data) if task.data and not task.env else heldout.name
    return f"{tasks} held-out tasks of {named}"


def _short_address(data: str) -> str:
    """Return the address of rows as a person would type it; a run has kept the whole path."""
    return short_path(Path(data)) if Path(data).exists() else data


def _data(result: _Result) -> dict[str, Any]:
    evaluations = result.evaluations.items()
    rewards = {name: asdict(evaluation.greedy_reward) for name, evaluation in evaluations}
    metrics = {name: evaluation.metrics("") for name, evaluation in evaluations}
    measured = {"env": result.heldout.name, "measured": result.measured}
    heldout = result.heldout
    tasks = data_of_tasks(heldout.tasks, result.evaluations, heldout.gold)
    data = measured | rewards | {"metrics": metrics, "tasks": tasks}
    return data | ({"comparison": asdict(result.comparison)} if result.comparison else {})


def _lines(
    result: _Result,
    model: str,
    compared: Mapping[str, str],
    show: int,
    notes: Sequence[str] = (),
) -> list[str]:
    heldout, evaluations = result.heldout, result.evaluations
    lines = [f"{model} on {result.measured}"]
    lines += [table([(name, _scores(one)) for name, one in evaluations.items()])]
    lines += [heldout.split_note] if heldout.split_note else []
    few = next(iter(evaluations.values())).greedy_reward.few_tasks_note(
        has_more=len(heldout.tasks) == result.asked
    )
    lines += [few] if few else []
    lines += [*_notes_about_length(result), *notes]
    if result.comparison is None:
        (evaluation,) = evaluations.values()
        return lines + lines_of_answers(heldout.tasks, evaluation, show, heldout.gold)
    lines += _comparison_lines(result.comparison, compared)
    return lines + lines_of_differences(heldout.tasks, evaluations, show, heldout.gold)


def _scores(evaluation: Evaluation) -> str:
    metrics = evaluation.metrics("")
    sampled = [f"{name} {value:.3f}" for name, value in metrics.items() if "@" in name]
    return "  ".join(
        [f"greedy {evaluation.greedy_reward}", *map(str, shown_numbers(metrics)), *sampled]
    )


def _notes_about_length(result: _Result) -> list[str]:
    cut = {name: one.metrics("")["clipped_ratio"] for name, one in result.evaluations.items()}
    return [
        f"{share:.0%} of the greedy answers of {name} are cut off at {result.heldout.max_tokens} "
        "tokens; --max-tokens allows longer ones"
        for name, share in cut.items()
        if share >= _MANY_CUT
    ]


def _comparison_lines(comparison: Comparison, compared: Mapping[str, str]) -> list[str]:
    before, after = compared.values()
    return [
        f"gain  {comparison} (paired bootstrap over tasks)",
        f"{comparison.better} tasks better, {comparison.worse} worse, "
        f"{comparison.count - len(comparison.differences)} equal",
        f"{after} is compared with {before}",
    ]
