"""`textpolicy eval`: evaluate a model on held-out tasks, with and without its adapters."""

from argparse import Namespace
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

from textpolicy.adapters.container import AdapterContainer
from textpolicy.cli.answer import Answer, table
from textpolicy.cli.flags import configured
from textpolicy.cli.output import print_note
from textpolicy.cli.progress import showing_progress
from textpolicy.config import TrainConfig, read_toml
from textpolicy.config.train import AdapterOptions
from textpolicy.environments import Environment
from textpolicy.evaluation import Comparison, Evaluation, HeldOut, compare, evaluate
from textpolicy.experiment.assembly import dtype_of, sampling_of, template_arguments_of
from textpolicy.experiment.model_defaults import with_model_defaults
from textpolicy.experiment.tasks import find_task, with_environment
from textpolicy.experiment.threads import apply_thread_option
from textpolicy.generation.mlx_generation import load_model
from textpolicy.generation.policy import ModelPolicy
from textpolicy.generation.thinking import describe_thinking
from textpolicy.rewards import Rewards, scorer_of

_MAX_SHOWN_CHARACTERS = 200


def run(options: Namespace) -> Answer:
    with showing_progress(print_note):
        return _run(options)


def _run(options: Namespace) -> Answer:
    config = _config(options)
    apply_thread_option(config.model)
    others = [with_environment(config.task, name) for name in config.evaluation.envs or ()]
    all_tasks = (config.task, *others)
    tasks = [find_task(task, config.run.seed, only_measured=True) for task in all_tasks]
    config = with_model_defaults(config)
    start, dtype = config.adapter.start, dtype_of(config.model)
    model, tokenizer = load_model(config.model.name, start, dtype=dtype)
    arguments = template_arguments_of(config.model, tokenizer)
    if thinking := describe_thinking(tokenizer, arguments):
        print_note(thinking)
    results = [
        _evaluate(
            config,
            ModelPolicy(
                model,
                tokenizer,
                sampling_of(config, task[0]),
                allow_special_tokens=config.model.allow_special_tokens,
                chat_template_kwargs=arguments,
            ),
            *task,
        )
        for task in tasks
    ]
    own, *rest = map(_data, results)
    lines = [line for one in results for line in _lines(one, config.model.name, options.show)]
    lines += _note_about_rows(config)
    return Answer(data=own | {"others": rest}, text="\n".join(lines))


def _config(options: Namespace) -> TrainConfig:
    """Return the config. Adapters of --adapter have a config of their own, not that of the file."""
    given = vars(options)
    if given.get("config") is None or "adapter.start" not in given:
        return configured(TrainConfig(), options)
    config = replace(read_toml(given["config"], TrainConfig()), adapter=AdapterOptions())
    return configured(config, Namespace(**given | {"config": None}))


def _note_about_rows(config: TrainConfig) -> list[str]:
    data = config.task.data
    if data is None or config.task.eval_data is not None:
        return []
    return [f"A tenth of the prompts is held out; --eval-data {data} measures every row"]


@dataclass(frozen=True, kw_only=True)
class _Result:
    """Evaluations of the base model, and of the model with adapters if there are any."""

    heldout: HeldOut
    evaluations: dict[str, Evaluation]
    comparison: Comparison | None


def _evaluate(
    config: TrainConfig, policy: ModelPolicy, environment: Environment, rewards: Rewards
) -> _Result:
    settings, adapters = config.evaluation, AdapterContainer.of(policy.model)
    with closing(environment), scorer_of(rewards) as scorer:
        heldout = HeldOut(
            name=environment.name,
            tasks=environment.heldout(settings.count),
            scorer=scorer,
            max_tokens=policy.sampling.max_tokens,
            split_note=environment.split_note,
        )
        options: dict[str, Any] = {
            name: getattr(settings, name) for name in ("samples", "temperature", "good")
        }
        with adapters.disabled() if adapters else nullcontext():
            evaluations = {"base": evaluate(policy, heldout, **options)}
        comparison = None
        if adapters:
            evaluations["adapter"] = evaluate(policy, heldout, **options)
            comparison = compare(heldout.tasks, evaluations["base"], evaluations["adapter"])
    return _Result(heldout=heldout, evaluations=evaluations, comparison=comparison)


def _data(result: _Result) -> dict[str, Any]:
    evaluations = result.evaluations.items()
    rewards = {name: asdict(evaluation.greedy_reward) for name, evaluation in evaluations}
    metrics = {name: evaluation.metrics("") for name, evaluation in evaluations}
    data = {"env": result.heldout.name, **rewards, "metrics": metrics}
    return data | ({"comparison": asdict(result.comparison)} if result.comparison else {})


def _lines(result: _Result, model: str, show: int) -> list[str]:
    heldout = result.heldout
    rows: list[tuple[str, str]] = []
    for name, evaluation in result.evaluations.items():
        sampled = {k: v for k, v in evaluation.metrics("").items() if "@" in k or "/" in k}
        shown = {name.removeprefix("rewards/"): value for name, value in sampled.items()}
        more = "".join(f"  {name} {value:.3f}" for name, value in shown.items())
        rows.append((name, f"greedy {evaluation.greedy_reward}{more}"))
    lines = [f"{model} on {len(heldout.tasks)} held-out tasks of {heldout.name}", table(rows)]
    lines += [heldout.split_note] if heldout.split_note else []
    few = next(iter(result.evaluations.values())).greedy_reward.few_tasks_note
    lines += [few] if few else []
    return lines + (_comparison_lines(result.comparison, show) if result.comparison else [])


def _comparison_lines(comparison: Comparison, show: int) -> list[str]:
    lines = [
        f"gain  {comparison} (paired bootstrap over tasks)",
        f"{comparison.better} tasks better, {comparison.worse} worse, "
        f"{comparison.count - len(comparison.differences)} equal",
    ]
    for difference in comparison.differences[:show]:
        rows = [
            ("prompt", difference.prompt),
            (f"base {difference.reward_before:g}", difference.before),
            (f"adapter {difference.reward_after:g}", difference.after),
        ]
        lines += ["", table([(name, _on_one_line(text)) for name, text in rows])]
    return lines


def _on_one_line(text: str) -> str:
    line = text.replace("\n", "\\n")
    limit = _MAX_SHOWN_CHARACTERS
    return line if len(line) <= limit else f"{line[:limit]} ..."
