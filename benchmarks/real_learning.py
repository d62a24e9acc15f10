"""Measure whether reinforcement learning raises the held-out score of a pretrained model.

    python benchmarks/real_learning.py --model build/smollm2-135m --tasks A,B,C --seeds 0,1,2
    python benchmarks/real_learning.py --tasks A,B,C --seeds 0,1,2 --steps 12 --peer trl
    python benchmarks/real_learning.py --table

Each run trains as `textpolicy train --model MODEL --env TASK --seed SEED` does, with the defaults
of the command or with the options of `--config`. The control is the same run with the rewards of
each step dealt to the wrong rollouts. `--peer trl` trains TRL's unchanged GRPOTrainer on the same
prompts in the same order, with the same rewards, the same first adapter and the same learning
rates; TextPolicy then evaluates TRL's adapter on the same held-out tasks. TRL lives in an
environment of its own:

    python -m venv build/peers/trl
    build/peers/trl/bin/pip install --only-binary :all: 'trl==1.16.*' torch peft

A run takes minutes. It is written to the file of records when it is finished, and is not repeated
if the file has a run with the same options, files and versions. So the records can be made in
pieces. `--table` trains nothing and prints the records as tables, and `--page docs/benchmarks.md`
writes the tables between the two marks of that page. The exit code is 1 if any run on record does
not gain more than two standard errors or collapses, if a control gains, or if the curves of TRL are
others; real/verdicts.py says how this is decided.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pages import write_page
from real.peer import INSTALL, train_with_trl, versions_of
from real.records import Record, RecordFile
from real.table import as_expected, markdown
from real.units import VARIANTS, Unit, train
from setting import setting

from textpolicy.config import TrainConfig, changed, read_toml
from textpolicy.experiment.threads import apply_thread_option

HERE = Path(__file__).parent
RECORDS = HERE / "results" / "real_learning.json"
MARK = "<!-- tables of real_learning.py -->"
PEER_PYTHON = HERE.parent / "build" / "peers" / "trl" / "bin" / "python"


def units_of(options: argparse.Namespace) -> Iterator[Unit]:
    """Yield the requested runs: for each task and seed TRL's, or ours and then the control."""
    for task in options.tasks.split(","):
        for seed in map(int, options.seeds.split(",")):
            unit = Unit(task=task, seed=seed, variant=options.variant)
            if options.peer:
                yield replace(unit, side=options.peer)
                continue
            yield unit
            if options.control:
                yield replace(unit, control=True)


def base_config(options: argparse.Namespace) -> TrainConfig:
    """Return the defaults of the command, or the config file, with the given options."""
    config = read_toml(options.config, TrainConfig()) if options.config else TrainConfig()
    asked = {
        "model.name": options.model,
        "model.threads": options.threads,
        "run.steps": options.steps,
    }
    return changed(config, {key: value for key, value in asked.items() if value is not None})


def command_of(unit: Unit, options: argparse.Namespace) -> str:
    """Return the command that repeats this run."""
    words = ["python", "benchmarks/real_learning.py"]
    words += ["--tasks", unit.task, "--seeds", str(unit.seed), "--variant", unit.variant]
    for name in ("model", "config", "steps", "threads"):
        if (value := getattr(options, name)) is not None:
            words += [f"--{name}", str(value)]
    words += ["--control"] if unit.control else []
    return shlex.join(words + (["--peer", unit.side] if unit.side != "ours" else []))


def measure(unit: Unit, options: argparse.Namespace, file: RecordFile) -> tuple[Record, bool]:
    """Return the record of a run and whether it is new: it is trained if the file lacks it."""
    base = base_config(options)
    versions = peer_versions(options.peer_python) if unit.side != "ours" else {}
    settings = unit.settings(base, versions)
    if known := file.find(settings):
        return known, False
    config = unit.config(base)
    apply_thread_option(config.model)
    if unit.side == "ours":
        found = train(config, show)
    else:
        before = known_before(settings, file)
        found = train_with_trl(config, str(options.peer_python), before)
    rollout = config.rollout
    record = {
        "settings": settings,
        "command": command_of(unit, options),
        "setting": setting(),
        "samples_per_step": rollout.groups_per_step * rollout.group_size,
        **found,
    }
    file.add(record)
    return record, True


def known_before(settings: dict[str, Any], file: RecordFile) -> dict[str, float] | None:
    """Return the score of the same base model on the same held-out tasks, if it was measured."""
    names = ("model.name", "model.dtype", "task.env", "sampling.max_tokens", "evaluation.count")

    def measured(one: dict[str, Any]) -> list[Any]:
        return [one["files"], *(one["options"].get(name) for name in names)]

    same = (one for one in file.read() if measured(one["settings"]) == measured(settings))
    return next((one["before"] for one in same if one["settings"]["variant"] == "lora"), None)


def peer_versions(python: Path) -> dict[str, str]:
    """Return the versions of TRL's environment. End the script if there is none."""
    if versions := versions_of(str(python)):
        return versions
    sys.exit(f"{python} has no TRL. Make an environment and install it there: {INSTALL}")


def show(text: str) -> None:
    """Print to stderr, so that stdout has only records."""
    print(text, file=sys.stderr, flush=True)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="build/smollm2-135m", help="default: %(default)s")
    parser.add_argument("--tasks", help="environments, separated by commas")
    parser.add_argument("--seeds", default="0", help="separated by commas (default: 0)")
    parser.add_argument("--variant", choices=VARIANTS, default="lora", help="default: lora")
    parser.add_argument("--control", action="store_true", help="train with shuffled rewards too")
    parser.add_argument("--peer", choices=("trl",), help="train with this library instead")
    text = "the interpreter of its environment (default: %(default)s)"
    parser.add_argument("--peer-python", type=Path, default=PEER_PYTHON, metavar="PATH", help=text)
    parser.add_argument("--steps", type=int, help="default: that of textpolicy train")
    parser.add_argument("--threads", type=int, help="default: that of textpolicy train")
    text = "TOML file with options of textpolicy train (default: its defaults)"
    parser.add_argument("--config", type=Path, metavar="FILE", help=text)
    parser.add_argument("--table", action="store_true", help="train nothing")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the tables to this page")
    parser.add_argument("--json", action="store_true", help="print the runs, not the tables")
    text = "file of records to extend (default: %(default)s)"
    parser.add_argument("--output", type=Path, default=RECORDS, metavar="FILE", help=text)
    options = parser.parse_args()
    options.table = options.table or bool(options.page and not options.tasks)
    if not options.table and not options.tasks:
        parser.error("no task is named. Name environments, for example --tasks json_format")
    return options


def main() -> int:
    options = read_options()
    file = RecordFile(options.output)
    for unit in () if options.table else units_of(options):
        record, is_new = measure(unit, options, file)
        show(f"{'trained' if is_new else 'on record'}: {unit}")
        if options.json:
            print(json.dumps(record), flush=True)
    records = file.read()
    if options.page:
        write_page(options.page, MARK, markdown(records))
    if not options.json:
        print(markdown(records))
    return 0 if as_expected(records) else 1


if __name__ == "__main__":
    sys.exit(main())
