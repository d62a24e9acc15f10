"""`textpolicy check`: try a reward on rows or on an environment's tasks before training on it."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import islice
from typing import Any

from textpolicy import fast_cpu
from textpolicy.cli.answer import Answer
from textpolicy.cli.check_advice import how_to_sample, next_after_check
from textpolicy.cli.models_of_runs import configured_to_sample
from textpolicy.cli.output import print_note
from textpolicy.cli.parser import CHECKED_ROWS, GRADED_ROWS
from textpolicy.cli.progress import showing_progress
from textpolicy.cli.timed_sampler import TimedSampler
from textpolicy.config import TrainConfig, changed
from textpolicy.config.train import TaskOptions
from textpolicy.environments import Dataset, from_dataset
from textpolicy.environments.chat import gold_for_turn, prompt_text
from textpolicy.environments.environment import USUAL_ANSWER_TOKENS, sum_turn_rewards
from textpolicy.environments.preamble import system_messages
from textpolicy.environments.template import check_template, fill_template
from textpolicy.errors import ConfigError
from textpolicy.experiment.assembly import template_arguments_of
from textpolicy.experiment.first_prompt import describe_prompt
from textpolicy.experiment.run_size import read_tokenizer
from textpolicy.experiment.tasks import data_source_of, find_task, with_task_preamble
from textpolicy.experiment.threads import apply_thread_option, thread_advice
from textpolicy.generation.prompts import encode_prompt
from textpolicy.rewards import Rewards, as_rewards, load_reward
from textpolicy.rewards.checked_rows import (
    PROMPT_COLUMNS,
    CheckedRow,
    checked_rows,
    gold_column_of,
    prompt_column_of,
)
from textpolicy.rewards.label_agreement import compare_with_labels
from textpolicy.rewards.reward_check import check_reward
from textpolicy.rewards.signal_check import MANY_CUT
from textpolicy.types import Prompt, Task


def run(options: Namespace) -> Answer:
    """Try the reward; the checks that need no model come first."""
    with showing_progress(print_note):
        return _run(options)


def _run(options: Namespace) -> Answer:
    config = configured_to_sample(options)
    apply_thread_option(config.model)
    if options.label_column:
        return _compare_with_labels(config.task, options)
    if options.sample and thread_advice(config.model):
        # No number of a check depends on the threads.
        fast_cpu.set_threads(1)
        print_note("other programs use this machine, so the check computes with one thread")
    if not (config.task.env or config.task.data):
        raise ConfigError(
            "there is nothing to try the reward on: name rows with --data rows.jsonl, or an "
            "environment with --env NAME"
        )
    if config.task.env:
        rewards, rows, max_tokens = _rows_of_environment(config, options)
    else:
        rewards, rows = _rows_of_data(config, options)
        config = _with_prompt_column(config, rows[0], options)
        max_tokens = USUAL_ANSWER_TOKENS
    max_tokens = config.sampling.max_tokens or max_tokens
    count = options.sample
    sampler = TimedSampler(config, count, max_tokens, options.seconds) if count else None
    check = check_reward(
        rewards,
        rows,
        sample=sampler.sample if sampler else None,
        greedy=sampler.greedy if sampler else None,
        limit=options.rows or CHECKED_ROWS,
    )
    if check.signal and sampler and sampler.cut_at < max_tokens and check.signal.cut > MANY_CUT:
        # What a run would see are longer answers than these.
        check = replace(check, signal=replace(check.signal, verdict="answers cut off"))
    asked = _describe_asked(config, rows)
    data = asdict(check) | {"ok": check.ok, "asked": asked}
    text = f"{replace(check, signal=None)}\n\n{asked}"
    if check.signal and sampler:
        advice = next_after_check(
            check.signal,
            config,
            sampler,
            has_gold=rows[0].gold is not None,
            gold_column=config.task.gold_column or gold_column_of(rows[0].example),
            options=options,
        )
        data["next"] = advice.command
        text += f"\n\n{check.signal}. {advice}"
    elif check.ok:
        advice = how_to_sample(config, options)
        data["next"] = advice.command
        text += f"\n\n{advice}"
    return Answer(data=data, text=text, exit_code=0 if check.ok else 1)


def _compare_with_labels(task: TaskOptions, options: Namespace) -> Answer:
    if not (task.data and task.reward) or task.env or options.sample:
        raise ConfigError(
            "--label-column compares a reward with your grades of answers. It needs the reward and "
            "the rows, and takes neither --env nor --sample: textpolicy check FILE.py --data "
            "graded.jsonl --label-column NAME"
        )
    rows = list(islice(data_source_of(task).rows(), options.rows or GRADED_ROWS))
    _check_prompt_column(rows, task, options)
    found = compare_with_labels(
        _rewards_of(task), rows, label=options.label_column, prompt=options.prompt_column
    )
    data = asdict(found) | {"verdict": found.verdict, "mean_rewards": found.mean_rewards}
    return Answer(data=data, text=str(found), exit_code=int(found.verdict == "disagrees"))


def _rewards_of(task: TaskOptions) -> Rewards:
    rewards = as_rewards(load_reward(str(task.reward)))
    return replace(rewards, timeout=task.reward_timeout) if task.reward_timeout else rewards


def _rows_of_data(config: TrainConfig, options: Namespace) -> tuple[Rewards, list[CheckedRow]]:
    task = config.task
    if not task.reward:
        raise ConfigError(
            "there is no reward to try on these rows: name it as FILE.py or FILE.py:FUNCTION"
        )
    rewards = _rewards_of(task)
    # Examples may come from any row.
    source, count = data_source_of(task), None if task.few_shot else options.rows or CHECKED_ROWS
    rows = list(islice(source.rows(), count))
    _check_prompt_column(rows, task, options)
    chosen = checked_rows(rows, prompt=options.prompt_column, gold=task.gold_column)
    if template := task.prompt:
        check_template(template, rows[0])
        filled = [prompt_text(fill_template(template, row)) for row in rows]
        chosen = [replace(one, prompt=text) for one, text in zip(chosen, filled, strict=True)]
    asked = _asked(config, chosen)
    return rewards, [replace(row, asked=one) for row, one in zip(chosen, asked, strict=True)]


def _check_prompt_column(
    rows: Sequence[Mapping[str, Any]], task: TaskOptions, options: Namespace
) -> None:
    """Raise `ConfigError` if nothing says what the model is asked."""
    if rows and not (task.prompt or options.prompt_column or prompt_column_of(rows[0])):
        raise ConfigError(
            f"the rows have no column of prompts; looked for {', '.join(PROMPT_COLUMNS)} among "
            f"{', '.join(rows[0])}. Name it, as in --columns prompt={next(iter(rows[0]))}, or "
            "write a prompt from the columns, as in --prompt 'Solve: {question}'"
        )


def _with_prompt_column(config: TrainConfig, row: CheckedRow, options: Namespace) -> TrainConfig:
    """Return the config with the column of prompts that was found, which `train` must be told."""
    column = options.prompt_column or prompt_column_of(row.example)
    if config.task.prompt or column in (None, "prompt"):
        return config
    return changed(config, {"task.columns": {**(config.task.columns or {}), "prompt": column}})


def _asked(config: TrainConfig, rows: Sequence[CheckedRow]) -> list[Prompt]:
    """Return what a model is asked for each row, with the system message and examples."""
    task, given = config.task, [row.example.get("prompt") for row in rows]
    # A prompt of several messages is asked as it is, unless a template has made another prompt.
    whole = [one if isinstance(one, list) and not task.prompt else None for one in given]
    prompts: list[Prompt] = [one or row.prompt for one, row in zip(whole, rows, strict=True)]
    if not task.few_shot:
        first = system_messages(task.system)
        return [Task(id="", prompt=prompt, preamble=first).asked for prompt in prompts]
    pairs = zip(rows, prompts, strict=True)
    data = Dataset.from_rows([{**row.example, "prompt": prompt} for row, prompt in pairs])
    environment = from_dataset(data, load_reward(str(task.reward)))
    tasks = with_task_preamble(task, environment, config.run.seed).tasks
    assert isinstance(tasks, Dataset)
    asked = {one.id: one.asked for one in (*tasks.train, *tasks.held_out)}
    return [asked[f"{data.name}/{number}"] for number in range(1, len(rows) + 1)]


def _rows_of_environment(
    config: TrainConfig, options: Namespace
) -> tuple[Rewards, list[CheckedRow], int]:
    task = config.task
    environment, rewards = find_task(task, config.run.seed)
    if environment.reward is sum_turn_rewards and not task.reward:
        raise ConfigError(
            f"environment {task.env} rewards each turn of an episode, and a single answer cannot "
            "show that; check it with textpolicy.environments.check_env, or name a reward of your "
            "own"
        )
    gold = environment.gold
    rows = [
        CheckedRow(
            prompt_text(one.prompt),
            one.example,
            gold_for_turn(gold(one.example), -1) if gold else None,
            one.asked,
        )
        for one in environment.heldout(options.rows or CHECKED_ROWS)
    ]
    return rewards, rows, environment.max_tokens


def _describe_asked(config: TrainConfig, rows: Sequence[CheckedRow]) -> str:
    """Return the prompt of the first row as the model would read it."""
    tokenizer = read_tokenizer(config.model)
    arguments = template_arguments_of(config.model, tokenizer)
    prompts = [row.asked or row.prompt for row in rows]
    tokens = encode_prompt(
        tokenizer,
        prompts[0],
        allow_special_tokens=config.model.allow_special_tokens,
        chat_template_kwargs=arguments,
    )
    return describe_prompt(tokenizer, tokens, arguments, prompts)
