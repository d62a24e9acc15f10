"""Simulate runs with any number of workers, ranks and machines from the measured times of one run.

    python benchmarks/simulate.py
    python benchmarks/simulate.py --page docs/scaling.md

It is an event simulation of the feed of a run: generations are divided into one job for each
worker, and at most `staleness + 1` of them are sampled, wait or are buffered. The times come from
results/workers.json: a step of one process at two sizes gives the seconds of a decoding step and of
a row in it, and of an update and of a token in it. Lengths are drawn from a lognormal distribution
that is cut at the limit, because the longest completion of a job decides when it ends. On one
machine, processes share the cores equally, and a process beside another one is slower by the part
that workers.py has measured.

The first table compares the simulation with the runs that workers.py has measured, each as a
multiple of the run in one process. The second goes
to numbers that were not measured, for a model and a network that the options describe.
"""

import argparse
import json
import math
from collections import deque
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

from pages import write_page

RECORD = Path(__file__).resolve().parent / "results" / "workers.json"
MARK = "<!-- tables of simulate.py -->"
_ROLLOUT_BYTES = 30
"""Bytes that ranks exchange for each token of a rollout."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What the work takes on one machine, in seconds, and the bytes of an adapter."""

    decode_step: float
    """One decoding step, whatever the number of rows."""
    decode_row: float
    """Each row of a decoding step, so each sampled token, with its share of the prompts."""
    update: float
    update_token: float
    between: float = 0.0
    """Between two steps: checkpoint, metrics and new adapters."""
    adapter_bytes: float = 4e6


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A run: its sizes, and the processes that compute it."""

    costs: Costs
    groups: int = 16
    size: int = 8
    mean_length: float = 256
    spread: float = 0.6
    """The standard deviation of the logarithm of a length."""
    max_length: int = 1024
    workers: int = 0
    staleness: int = 0
    ranks: int = 1
    cores: int | None = None
    """The cores that all processes share, or None if each has a machine of its own."""
    beside_another: float = 1.0
    """The speed of a process while another one computes on the same machine; 1.0 is that alone."""
    bytes_per_second: float = 1.1e8
    delay: float = 2e-4


@dataclass(frozen=True)
class Outcome:
    """Rollouts per second, and who waited."""

    rate: float
    staleness: float
    trainer_idle: float
    workers_idle: float


@dataclass(eq=False)
class _Job:
    """The part of a generation that one worker plays."""

    generation: int
    seconds: float
    tokens: int
    version: int = 0


@dataclass
class _Simulation:
    """The state of a run at one time. Work is measured in seconds of a process of its own."""

    setup: Setup
    random: Random
    steps: int
    now: float = 0.0
    version: int = 0
    begun: int = 0
    pending: int = 0
    """Generations that are sampled, wait or are buffered."""
    dropped: int = 0
    queue: deque[_Job] = field(default_factory=deque[_Job])
    playing: dict[_Job, float] = field(default_factory=dict[_Job, float])
    arrived: dict[int, list[_Job]] = field(default_factory=dict[int, list[_Job]])
    buffer: deque[list[_Job]] = field(default_factory=deque[list[_Job]])
    training: float | None = None
    ages: list[int] = field(default_factory=list[int])
    idle_trainer: float = 0.0
    busy_workers: float = 0.0

    def run(self) -> Outcome:
        """Run all steps. The first fifth of them is left out of the numbers."""
        first = self.steps // 5
        marks = (0.0, 0.0, 0.0)
        while self.version < self.steps:
            self._begin()
            self._advance()
            if self.version == first and not any(marks):
                marks = (self.now, self.idle_trainer, self.busy_workers)
        seconds = self.now - marks[0]
        setup, workers = self.setup, max(1, self.setup.workers)
        return Outcome(
            rate=(self.steps - first) * setup.groups * setup.size / seconds,
            staleness=sum(self.ages[first:]) / (self.steps - first),
            trainer_idle=(self.idle_trainer - marks[1]) / seconds,
            workers_idle=1 - (self.busy_workers - marks[2]) / seconds / workers,
        )

    def _begin(self) -> None:
        """Begin everything that can begin now."""
        setup, workers = self.setup, max(1, self.setup.workers)
        if self.training is None:
            fresh = [jobs for jobs in self.buffer if self._age(jobs) <= setup.staleness]
            self.dropped += len(self.buffer) - len(fresh)
            self.pending -= len(self.buffer) - len(fresh)
            self.buffer = deque(fresh)
            while self.pending <= setup.staleness:
                self.queue.extend(self._divide(self.begun, workers))
                self.begun += 1
                self.pending += 1
            if self.buffer:
                jobs = self.buffer.popleft()
                self.pending -= 1
                self.ages.append(self._age(jobs))
                self.training = self._update_seconds(sum(job.tokens for job in jobs))
        # A process that samples itself does nothing else.
        if setup.workers or self.training is None:
            while self.queue and len(self.playing) < workers:
                job = self.queue.popleft()
                job.version = self.version
                self.playing[job] = job.seconds

    def _age(self, jobs: list[_Job]) -> int:
        """Return the staleness of a generation."""
        return self.version - min(job.version for job in jobs)

    def _advance(self) -> None:
        """Go to the next time at which a job or an update ends."""
        setup = self.setup
        busy = len(self.playing) + (self.training is not None)
        busy = min(busy, 1) * setup.ranks if not setup.workers else busy
        speed = min(1.0, setup.cores / busy) if setup.cores else 1.0
        speed *= setup.beside_another if busy > 1 else 1.0
        left = [*self.playing.values(), *([] if self.training is None else [self.training])]
        work = min(left)
        seconds = work / speed
        self.now += seconds
        self.busy_workers += seconds * len(self.playing)
        for job in self.playing:
            self.playing[job] -= work
        if self.training is None:
            self.idle_trainer += seconds
        else:
            self.training -= work
            if self.training <= 0:
                self.training = None
                self.version += 1
        for job in [job for job, left in self.playing.items() if left <= 0]:
            del self.playing[job]
            jobs = self.arrived.setdefault(job.generation, [])
            jobs.append(job)
            if len(jobs) == min(max(1, setup.workers), setup.groups):
                self.buffer.append(self.arrived.pop(job.generation))

    def _divide(self, generation: int, workers: int) -> list[_Job]:
        """Return the jobs of a generation, one for each worker, with drawn lengths."""
        setup, costs = self.setup, self.setup.costs
        count = min(workers, setup.groups)
        ends = [setup.groups * number // count for number in range(count + 1)]
        # All workers fetch a new version from the trainer at about the same time.
        network = setup.workers and setup.cores is None
        fetch = costs.adapter_bytes * workers / setup.bytes_per_second if network else 0.0
        jobs: list[_Job] = []
        for number in range(count):
            groups = ends[number + 1] - ends[number]
            rows = [[self._length() for _ in range(setup.size)] for _ in range(groups)]
            tokens = sum(map(sum, rows))
            # Ranks play the job together, each a part of its groups.
            parts = [rows[rank :: setup.ranks] for rank in range(setup.ranks)]
            seconds = max(self._play_seconds(part) for part in parts)
            exchange = self._exchange_seconds(_ROLLOUT_BYTES * tokens)
            jobs.append(_Job(generation, seconds + fetch + exchange, tokens))
        return jobs

    def _play_seconds(self, groups: list[list[int]]) -> float:
        costs = self.setup.costs
        lengths = [length for group in groups for length in group]
        longest = max(lengths, default=0)
        return costs.decode_step * longest + costs.decode_row * sum(lengths)

    def _update_seconds(self, tokens: int) -> float:
        costs, ranks = self.setup.costs, self.setup.ranks
        work = costs.update + costs.update_token * tokens / ranks
        return work + costs.between + self._exchange_seconds(costs.adapter_bytes)

    def _exchange_seconds(self, size: float) -> float:
        """Return the time of a sum or an exchange of so many bytes in a ring of the ranks."""
        setup, others = self.setup, self.setup.ranks - 1
        if not others:
            return 0.0
        network = 0.0 if setup.cores else 2 * others / setup.ranks * size / setup.bytes_per_second
        return network + 2 * others * setup.delay

    def _length(self) -> int:
        setup = self.setup
        location = math.log(setup.mean_length) - setup.spread**2 / 2
        drawn = self.random.lognormvariate(location, setup.spread)
        return max(1, min(setup.max_length, round(drawn)))


def simulate(setup: Setup, *, steps: int = 60, seed: int = 0) -> Outcome:
    """Return the outcome of a run of so many steps."""
    return _Simulation(setup, Random(seed), steps).run()


def costs_of(phases: list[dict[str, float]], longest: int) -> Costs:
    """Return the costs that explain the steps of one process at two sizes.

    What grows with the tokens is the cost of a token, with its share of the prompts; the rest is
    that of the decoding steps, of which the longest completion has `longest`, and of an update.
    """
    small, large = sorted(phases, key=lambda one: one["num_tokens"])
    tokens = large["num_tokens"] - small["num_tokens"]

    def split(name: str) -> tuple[float, float]:
        slope = max(0.0, (large[name] - small[name]) / tokens)
        return max(0.0, large[name] - slope * large["num_tokens"]), slope

    (steps, row), (update, token) = split("time/generate"), split("time/train")
    known = sum(large.get(f"time/{name}", 0.0) for name in ("generate", "reward", "train"))
    return Costs(
        decode_step=steps / longest,
        decode_row=row,
        update=update,
        update_token=token,
        between=large["whole step"] - known,
    )


def compare(record: dict[str, Any]) -> list[list[str]]:
    """Return rates as multiples of one process: the side, measured, simulated and the error."""
    options, cores = record["options"], 2
    large = max(record["phases"], key=lambda one: one["groups"])
    mean = large["num_tokens"] / large["groups"] / options["size"]
    longest = math.ceil(mean) + 1
    one = Setup(
        costs=costs_of(record["phases"], longest),
        groups=options["groups"],
        size=options["size"],
        mean_length=mean,
        spread=0.1,
        max_length=longest,
        cores=cores,
        beside_another=record["beside_another"],
    )
    sides = {
        "one process": one,
        "1 worker": replace(one, workers=1, staleness=1),
        "2 workers": replace(one, workers=2, staleness=1),
        "2 Ray actors": replace(one, workers=2, staleness=1),
        "2 ranks": replace(one, ranks=2),
    }
    alone = simulate(one).rate
    rows: list[list[str]] = []
    for row in record["rows"]:
        if row["task"] == "add" and (side := row["side"]) != "one process":
            measured, simulated = row["times_one_process"], simulate(sides[side]).rate / alone
            error = simulated / measured - 1
            rows.append([side, f"{measured:.2f}", f"{simulated:.2f}", f"{error:+.0%}"])
    return rows


def explore(record: dict[str, Any], options: argparse.Namespace) -> list[list[str]]:
    """Return rates, staleness and waits for more workers and ranks, on a machine each."""
    phases = record["larger"]["phases"]
    costs = costs_of(phases, record["larger"]["max_tokens"])
    one = Setup(
        costs=costs,
        groups=options.groups,
        size=options.size,
        mean_length=options.mean_length,
        spread=options.spread,
        max_length=options.max_length,
        bytes_per_second=options.bandwidth,
    )
    base = simulate(one).rate
    rows: list[list[str]] = []
    setups = [replace(one, ranks=ranks) for ranks in (1, 2, 4, 8, 16)]
    for workers in (1, 2, 4, 16, 256):
        setups += [replace(one, workers=workers, staleness=bound) for bound in (1, 4)]
    for setup in setups:
        found = simulate(setup)
        machines = setup.ranks + setup.workers
        times = found.rate / base
        rows.append(
            [
                str(machines),
                str(setup.workers),
                str(setup.ranks),
                str(setup.staleness),
                f"{times:.2f}",
                f"{times / machines:.0%}",
                f"{found.staleness:.1f}",
                f"{found.trainer_idle:.0%}" if setup.workers else "-",
                f"{found.workers_idle:.0%}" if setup.workers else "-",
            ]
        )
    return rows


def tables(record: dict[str, Any], options: argparse.Namespace) -> str:
    """Return both tables in Markdown."""
    checked = _table(["side", "times one process, measured", "simulated", "error"], compare(record))
    names = ["machines", "workers", "ranks", "--max-staleness", "times one machine"]
    names += ["of each machine", "mean staleness", "trainer waits", "workers wait"]
    return f"{checked}\n\n{_table(names, explore(record, options))}"


def _table(names: list[str], rows: list[list[str]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", type=Path, default=RECORD, help="default: %(default)s")
    parser.add_argument("--groups", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--size", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--mean-length", type=float, default=128, help="default: %(default)s")
    parser.add_argument("--spread", type=float, default=0.6, help="default: %(default)s")
    parser.add_argument("--max-length", type=int, default=512, help="default: %(default)s")
    text = "bytes a second of the network (default: %(default)s)"
    parser.add_argument("--bandwidth", type=float, default=1.1e8, help=text)
    parser.add_argument("--page", type=Path, help="write the tables into this page")
    options = parser.parse_args()
    record = json.loads(options.record.read_text("utf-8")) if options.record.exists() else {}
    if "larger" not in record:
        parser.error(
            f"{options.record} has no times of a larger model. Measure them first: "
            "python benchmarks/workers.py --larger build/smollm2-135m --output "
            f"{options.record}"
        )
    text = tables(record, options)
    if options.page:
        write_page(options.page, MARK, text)
    else:
        print(text)


if __name__ == "__main__":
    main()
