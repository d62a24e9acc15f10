"""`textpolicy train`: a run of reinforcement learning. Its options are in `config/train.py`."""

from argparse import Namespace
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from math import hypot
from typing import Any

from textpolicy.cli.answer import Answer
from textpolicy.cli.dry_run import check_flags_of_plan, show_plan
from textpolicy.cli.flags import configured, configured_to_resume
from textpolicy.cli.listener import listening
from textpolicy.cli.next_commands import next_commands, next_lines
from textpolicy.cli.output import print_note
from textpolicy.cli.ranks import follow_first_rank, launch_ranks
from textpolicy.cli.typed_flags import short_path
from textpolicy.config import TrainConfig
from textpolicy.errors import ConfigError, ModelError
from textpolicy.experiment import Measurement, RunResult
from textpolicy.experiment import run as run_config
from textpolicy.experiment.following import check_can_be_divided
from textpolicy.experiment.model_defaults import with_model_defaults
from textpolicy.experiment.resuming import resume_line
from textpolicy.ranks import ALONE, join_ranks


def run(options: Namespace) -> Answer:
    """Train, or show what training would take."""
    check_flags_of_plan(options)
    if options.measure and not options.dry_run:
        raise ConfigError(
            "--measure estimates the memory of a run from two steps, and starts no run. Type "
            "--dry-run --measure, or leave out --measure"
        )
    ranks = ALONE
    several = (options.ranks or 1) > 1
    if not several and not options.dry_run:
        ranks = join_ranks(deadline=options.rank_deadline, tell=print_note)
    if not ranks.is_first:
        return follow_first_rank(ranks)
    if options.resume:
        config = configured_to_resume(TrainConfig(), options)
    else:
        config = configured(TrainConfig(), options)
        # The run says what is wrong with a model, after it has checked the task.
        with suppress(ModelError):
            config = with_model_defaults(config)
    if options.dry_run:
        return show_plan(config, measure=options.measure, all_settings=options.all_settings)
    if several:
        check_can_be_divided(config, int(options.ranks))
        return launch_ranks(options)
    with listening(config.run.steps, measured_every=config.evaluation.every) as listener:
        result = run_config(
            config, resume=options.resume, force=options.force, on_event=listener, ranks=ranks
        )
        if result.after:
            directory = result.directory
            files = f"{describe_adapter(result)}\nreport: {short_path(directory.report)}"
            following = next_commands(result, config)
            read = f"\n{how_to_read(following)}" if result.doubts else ""
            text = f"{describe_result(result)}{read}\n{files}\n{next_lines(following)}"
        else:
            following = {}
            text = listener.stopped(resume_line(result.directory, config))
        data = _data(result) | {"next": list(following.values())}
        return Answer(data=data, text=text, exit_code=listener.exit_code(result, ranks=ranks.size))


def describe_result(result: RunResult) -> str:
    """Return the result of a finished run in a few lines for people."""
    assert result.after
    gain, error = _gain(result)
    text = (
        f"greedy reward on {result.after.count} held-out tasks: "
        f"{result.before} before, {result.after} after ({gain:+.3f} ± {error:.3f})\n"
        f"{result.steps} steps in {result.seconds:.0f} s"
    )
    if result.ended == "alarm":
        text += (
            "\nAn alarm stopped the run. The adapters are again those of version "
            f"{result.facts['kept']}, which had the best reward"
        )
    if result.updates == 0:
        text += (
            "\nNo update was made, so the adapters change nothing. Does the reward differ between "
            "completions of one task?"
        )
    elif abs(gain) < 2 * error:
        text += (
            "\nThis difference is below twice its standard error, so it may be chance. `textpolicy "
            "eval` compares task by task, and can show smaller ones"
        )
    if result.doubts:
        text += "\n" + "\n".join(f"{doubt}." for doubt in result.doubts)
    return text


def how_to_read(following: Mapping[str, str]) -> str:
    """Return the line that says how to read the answers of a run."""
    return f"read the answers: {following['compare it']} --show 8"


def describe_adapter(result: RunResult) -> str:
    """Return which adapter the next commands name and what it scored, in one or two lines."""
    directory, after, best = result.directory, result.after, result.best
    adapter, last = short_path(directory.chosen_adapter()), short_path(directory.latest)
    if result.ended == "alarm":
        return f"adapter: {adapter} (the best one, measured after the run)"
    if best is None or not directory.best_is_measured:
        return f"adapter: {adapter} (the last one, measured after the run)"
    assert after
    if best.step == after.step:
        return f"adapter: {adapter} (the last one, which has the best measurement)"
    why = f"the best one, {best} after step {best.step}"
    if not best.step:
        why = f"from before training: no later measurement is better than {best}"
    return f"adapter: {adapter} ({why})\nlast adapter: {last} ({after}, measured after the run)"


def _gain(result: RunResult) -> tuple[float, float]:
    """Return the gain and its standard error, as if other tasks were measured the second time."""
    assert result.before and result.after
    errors = (result.before.standard_error or 0.0, result.after.standard_error or 0.0)
    return result.after.value - result.before.value, hypot(*errors)


def _data(result: RunResult) -> dict[str, Any]:
    return {
        "before": _score(result.before),
        "after": _score(result.after),
        "steps": result.steps,
        "updates": result.updates,
        "seconds": result.seconds,
        "run": str(result.directory.path),
        "adapters": str(result.directory.latest),
        "adapter": str(result.directory.chosen_adapter()) if result.after else None,
        "best": _best(result),
        "report": str(result.directory.report),
        "alarms": result.alarms,
        "doubts": result.doubts,
        "kept": result.facts.get("kept"),
    }


def _best(result: RunResult) -> dict[str, Any] | None:
    """Return the best measurement and its step, if the best adapter was chosen by measurements."""
    if result.best is None or not result.directory.best_is_measured:
        return None
    return {**(_score(result.best) or {}), "step": result.best.step}


def _score(measured: Measurement | None) -> dict[str, Any] | None:
    if measured is None:
        return None
    values = asdict(measured)
    return {"reward": measured.value} | {n: values[n] for n in ("standard_error", "count")}
