"""`textpolicy sft`: supervised training on rows of text. Its options are in `config/sft.py`."""

from argparse import Namespace
from typing import Any

from textpolicy.cli.answer import Answer
from textpolicy.cli.dry_run import check_flags_of_plan, show_plan
from textpolicy.cli.flags import configured, configured_to_resume
from textpolicy.cli.listener import TerminalListener, listening
from textpolicy.cli.next_commands import next_commands, next_lines, note_about_reward
from textpolicy.config import SFTConfig
from textpolicy.experiment import RunResult
from textpolicy.experiment import run as run_config
from textpolicy.experiment.resuming import resume_line

_ENDS = {"finished": "", "stopped": " (stopped)", "early": " (out of patience)"}


def run(options: Namespace) -> Answer:
    """Train on rows of text, or show what training would take."""
    check_flags_of_plan(options)
    if options.resume:
        config = configured_to_resume(SFTConfig(), options)
    else:
        config = configured(SFTConfig(), options)
    if options.dry_run:
        return show_plan(config, all_settings=options.all_settings)
    with listening(config.trainer.iterations or 0, panel=False) as listener:
        result = run_config(config, resume=options.resume, force=options.force, on_event=listener)
        text = _text(result, config, listener)
        following = {} if result.ended == "stopped" else next_commands(result, config)
        if following:
            text += f"\n{next_lines(following)}\n{note_about_reward(result)}"
        data = _data(result) | {"next": list(following.values())}
        return Answer(data=data, text=text, exit_code=listener.exit_code(result))


def _text(result: RunResult, config: SFTConfig, listener: TerminalListener) -> str:
    directory = result.directory
    facts: dict[str, object] = {
        "data": result.facts["data"],
        "iterations": f"{result.steps}{_ENDS[result.ended]} in {result.seconds:.0f} s",
    }
    if result.after:
        # A full disk may have lost the first measurement.
        before = f"{result.before} before, " if result.before else ""
        facts["validation loss"] = f"{before}{result.after} after"
    if result.test:
        facts["test loss"] = result.test
    facts["last adapters"] = directory.latest
    if result.best:
        facts["best adapters"] = (
            f"{directory.best} (validation loss {result.best} after {result.best.step} iterations)"
        )
    facts["report"] = directory.report
    if result.ended == "stopped":
        facts["stopped"] = listener.stopped(resume_line(directory, config))
    return "\n".join(f"{name}: {value}" for name, value in facts.items())


def _data(result: RunResult) -> dict[str, Any]:
    directory, best = result.directory, result.best
    return {
        "iteration": result.steps,
        "ended": result.ended,
        "validation_loss": result.after and result.after.value,
        "best_loss": best and best.value,
        "best_iteration": best and best.step,
        "test_loss": result.test and result.test.value,
        "truncated": result.facts["truncated"],
        "dropped": result.facts["dropped"],
        "seconds": result.seconds,
        "alarms": result.alarms,
        "adapters": str(directory.latest),
        "best_adapters": str(directory.best) if best else None,
        "report": str(directory.report),
    }
