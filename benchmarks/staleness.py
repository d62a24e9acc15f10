"""Measure what staleness costs, and what corrections for it give.

    python benchmarks/staleness.py --seeds 0,1,2 --json
    python benchmarks/staleness.py --seeds 0,1,2 --ways workers
    python benchmarks/staleness.py --page docs/benchmarks.md

GRPO trains the embedded model on `add`, as in the demo. The `simulated` way is deterministic: each
group is sampled as soon as the bound on staleness allows, so after the first steps every group is
exactly as stale as allowed. The `workers` way is that of `textpolicy train --workers 1`, where time
decides how stale a group is. The control has the rewards of each step dealt to the wrong rollouts.

A run that is in the file of records already, with the same options and versions, is not repeated.
`--page` trains nothing and writes the table of the records between the two marks of a page. The
exit code is 1 if a run on record gains less than MARGIN, or a control gains more.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

from learning import MARGIN, algorithm_of, show
from pages import write_page
from setting import setting

from textpolicy import fast_cpu
from textpolicy.config import DEMO, TrainConfig, changed
from textpolicy.evaluation import MeanReward
from textpolicy.evaluation.evaluate import evaluate_greedy
from textpolicy.experiment.assembly import assemble
from textpolicy.experiment.events import Reporter
from textpolicy.experiment.reinforcement import train_policy
from textpolicy.experiment.tasks import find_task
from textpolicy.loop import StepReport, train_rl
from textpolicy.rewards import Scorer, scorer_of
from textpolicy.rollout.executors.executor import FinishedJob, RolloutJob
from textpolicy.rollout.executors.in_process import InProcessExecutor
from textpolicy.runs import RunDirectory
from textpolicy.tracking.jsonl import read_metrics
from textpolicy.types import Policy

RECORDS = Path(__file__).parent / "results" / "staleness.json"
MARK = "<!-- table of staleness.py -->"
CORRECTION = {"algorithm.old_logprobs": "fresh", "algorithm.weights": ("truncate_tokens",)}
AVERAGED = {
    "staleness": "staleness/mean",
    "token_staleness": "staleness/token_mean",
    "mixed_tokens": "staleness/mixed_tokens",
    "difference": "sampling/sampling_logp_difference/mean",
}
Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One run: how it samples, how stale its groups may be, and what it does about that."""

    way: str
    max_staleness: int
    corrected: bool = False
    swap: str = "completions"
    control: bool = False
    seed: int = 0
    steps: int = 0

    @property
    def config(self) -> TrainConfig:
        """The demo with the options of the run."""
        what = {
            "run.seed": self.seed,
            "run.steps": self.steps,
            "run.sample_groups": 0,
            "run.checkpoint_every": self.steps,
            "rollout.max_staleness": self.max_staleness,
            "rollout.workers": 1 if self.way == "workers" else 0,
            "rollout.swap": self.swap,
        }
        return changed(DEMO, what | (CORRECTION if self.corrected else {}))


class EagerExecutor:
    """Plays a job when it is submitted, which is as early as the bound on staleness allows."""

    workers = 1
    in_background = True

    def __init__(self, policy: Policy, scorer: Scorer) -> None:
        self._player = InProcessExecutor(policy, scorer)
        self._finished: list[FinishedJob] = []

    def follow(self, version: int, published: Path) -> None:
        self._player.follow(version, published)

    def submit(self, job: RolloutJob) -> None:
        self._player.submit(job)
        self._finished += self._player.completed(wait=True)

    def completed(self, *, wait: bool) -> list[FinishedJob]:
        finished, self._finished = self._finished, []
        return finished

    def restart(self, worker: int) -> None:
        """Return at once: there is no process to end."""

    def close(self) -> None:
        self._finished.clear()


def simulate(unit: Unit, directory: RunDirectory) -> tuple[MeanReward, MeanReward, list[Any]]:
    """Train in this process. Return the scores before and after, and the metrics of all steps."""
    config = unit.config
    algorithm = algorithm_of(config, control=unit.control)
    environment, rewards = find_task(config.task, unit.seed)
    parts = assemble(config, environment, rewards, algorithm, directory)
    heldout = environment.heldout(int(config.evaluation.count))
    rows: list[Any] = []

    def record(report: StepReport) -> None:
        rows.append(report.metrics)

    with scorer_of(parts.reward) as scorer:
        before = evaluate_greedy(parts.policy, heldout, scorer)
        train_rl(
            tasks=environment.stream(unit.seed),
            reward=scorer,
            policy=parts.policy,
            trainer=parts.trainer,
            steps=unit.steps,
            groups_per_step=int(config.rollout.groups_per_step),
            group_size=int(config.rollout.group_size),
            seed=unit.seed,
            executor=EagerExecutor(parts.policy, scorer),
            max_staleness=unit.max_staleness,
            on_step=record,
        )
        return before, evaluate_greedy(parts.policy, heldout, scorer), rows


def train_with_workers(
    unit: Unit, directory: RunDirectory
) -> tuple[MeanReward, MeanReward, list[Any]]:
    """Train beside a worker's process; return what `simulate` returns."""
    algorithm = algorithm_of(unit.config, control=unit.control)
    result = train_policy(unit.config, directory, Reporter(show), algorithm=algorithm)
    before, after = (
        MeanReward(reward=one.value, standard_error=one.standard_error or 0, count=one.count or 0)
        for one in (result.before, result.after)
        if one
    )
    return before, after, [row for row in read_metrics(directory.metrics) if "loss" in row]


WAYS = {"simulated": simulate, "workers": train_with_workers}


def measure(unit: Unit) -> Record:
    """Train once, and return the record of the run."""
    with tempfile.TemporaryDirectory() as folder:
        before, after, rows = WAYS[unit.way](unit, RunDirectory(Path(folder)))
    averages = {
        name: float(f"{mean(known):.3g}")
        for name, metric in AVERAGED.items()
        if (known := [row[metric] for row in rows if metric in row])
    }
    gain = after.reward - before.reward
    return (
        asdict(unit)
        | averages
        | {
            "before": round(before.reward, 4),
            "after": round(after.reward, 4),
            "standard_error": round(after.standard_error, 4),
            "gain": round(gain, 4),
            "dropped": int(sum(row.get("buffer/dropped", 0) for row in rows)),
            "as_expected": gain < MARGIN if unit.control else gain > MARGIN,
            "curve": [round(float(row["reward"]), 3) for row in rows if "reward" in row],
            "setting": setting(),
        }
    )


def units_of(options: argparse.Namespace) -> Iterator[Unit]:
    """Yield the runs of each seed: the two bounds, then the correction and the control."""
    for way, seed in product(options.ways.split(","), map(int, options.seeds.split(","))):
        first = Unit(way=way, max_staleness=0, seed=seed, steps=options.steps)
        stale = replace(first, max_staleness=options.max_staleness)
        yield from (first, stale, replace(stale, corrected=True))
        if way == "workers":
            yield replace(stale, swap="tokens")
        else:
            yield replace(stale, control=True)


def is_of(record: Record, unit: Unit) -> bool:
    """Return whether a record is of this run, with these versions."""
    now = setting()
    versions = ("textpolicy", "mlx", "mlx-lm", "python")
    return all(record[name] == value for name, value in asdict(unit).items()) and all(
        record["setting"][name] == now[name] for name in versions
    )


def table(records: list[Record]) -> str:
    """Return the records as a table of Markdown, with the seeds of a row together."""
    names = ("way", "max_staleness", "corrected", "swap", "control", "steps")
    rows: dict[tuple[Any, ...], list[Record]] = {}
    for record in sorted(records, key=lambda one: one["seed"]):
        rows.setdefault(tuple(record[name] for name in names), []).append(record)
    lines = [
        "| sampling | bound | correction | swap | steps | staleness | of tokens | before "
        "| after, by seed | learned |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (way, bound, corrected, swap, control, steps), runs in sorted(rows.items()):
        after = ", ".join(f"{run['after']:.3f} ± {run['standard_error']:.3f}" for run in runs)
        learned = f"{sum(run['gain'] > MARGIN for run in runs)} of {len(runs)}"
        numbers = [
            f"{mean(run[key] for run in runs):.2f}" for key in ("staleness", "token_staleness")
        ]
        correction = "`truncate_tokens`" if corrected else ""
        cells = [way + (", rewards shuffled" if control else ""), str(bound), correction, swap]
        cells += [str(steps), *numbers, f"{runs[0]['before']:.3f}", after, learned]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", default="0", help="separated by commas (default: 0)")
    parser.add_argument("--ways", default="simulated", help="simulated, workers, or both")
    parser.add_argument("--max-staleness", type=int, default=4, help="the bound beside 0")
    parser.add_argument("--steps", type=int, default=DEMO.run.steps, help="as in the demo")
    parser.add_argument("--json", action="store_true", help="print a JSON object for each run")
    parser.add_argument("--output", type=Path, default=RECORDS, metavar="FILE", help="the records")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the table to this page")
    options = parser.parse_args()
    records = json.loads(options.output.read_text())["runs"] if options.output.exists() else []
    if options.page:
        write_page(options.page, MARK, table(records))
        return 0
    if fast_cpu.enable().threads:
        fast_cpu.set_threads(1)
    for unit in units_of(options):
        if not any(is_of(record, unit) for record in records):
            records = [one for one in records if not _replaces(unit, one)]
            records.append(measure(unit))
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps({"runs": records}) + "\n")
            print(json.dumps(records[-1]) if options.json else table(records[-1:]), flush=True)
    return 0 if all(record["as_expected"] for record in records) else 1


def _replaces(unit: Unit, record: Record) -> bool:
    return all(record[name] == value for name, value in asdict(unit).items())


if __name__ == "__main__":
    sys.exit(main())
