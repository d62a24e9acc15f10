"""Workers that run ahead: what is trained on is fresh, counted, bounded, and trained on once."""

import json
from itertools import count
from pathlib import Path
from random import Random

import mlx.core as mx
import pytest

from tests.rollout.late_executor import LateExecutor
from textpolicy.adapters import AdapterConfig, AdapterContainer, shared_copy
from textpolicy.algorithms import grpo
from textpolicy.buffer import Buffer
from textpolicy.environments.curriculum import MixedTaskCurriculum
from textpolicy.errors import ConfigError, TrainingError
from textpolicy.generation.mlx_generation import create_policy
from textpolicy.loop import train_rl
from textpolicy.rewards import Rewards, Scorer, scorer_of
from textpolicy.rollout.executors.in_process import InProcessExecutor
from textpolicy.rollout.feed import FeedOptions, RolloutFeed
from textpolicy.rollout.task_source import TaskSource
from textpolicy.training.checkpoint import Checkpoints
from textpolicy.training.optimizer import build_optimizer
from textpolicy.training.trainer import Trainer
from textpolicy.types import Completion, Progress, Sampling, StopReason, Task

GROUPS = 2
MEASURED = ("time/", "memory/", "tokens_per_second", "workers/", "buffer/", "trainer/")


def numbered():
    for number in count():
        yield Task(id=str(number), prompt=f"{number}+1=", example={"answer": str(number + 1)})


def varied(completion):
    """A reward that hardly ever is equal in a group, so that each step makes a new version."""
    return sum(map(ord, completion)) % 17 / 16


class Run:
    """A run of a few steps in a folder, with workers that end late if `workers` is not 0."""

    def __init__(self, load_tiny, folder, *, workers=2, **late):
        model, tokenizer = load_tiny()
        self.adapters = AdapterContainer.from_model(model, AdapterConfig(rank=2), seed=1)
        self.adapters.publish_path = folder / "adapters.safetensors"
        self.checkpoints = Checkpoints(folder / "checkpoints")
        self.policy = create_policy(shared_copy(model), tokenizer, {"max_tokens": 4})
        self.trainer = Trainer(
            model, grpo.compute_advantages, grpo.policy_loss, build_optimizer(1e-2), seed=5
        )
        self.scorer = Scorer(Rewards(varied))
        self.executor = None
        if workers:
            self.executor = LateExecutor(self.policy, self.scorer, workers=workers, **late)
        self.reports = []

    def train(self, *, steps=6, until=None, tasks=None, resume=None, **options):
        def see(report):
            self.reports.append(report)
            return Progress.STOP if report.step + 1 == until else Progress.MORE

        train_rl(
            tasks=tasks or numbered(),
            reward=self.scorer,
            policy=self.policy,
            trainer=self.trainer,
            steps=steps,
            groups_per_step=GROUPS,
            group_size=2,
            seed=3,
            executor=self.executor,
            on_step=see,
            checkpoints=self.checkpoints,
            resume=self.checkpoints.newest() if resume else None,
            **options,
        )
        return self

    @property
    def trained(self):
        """The ids of the tasks that were trained on, in order."""
        return [group.task.id for report in self.reports for group in report.trained]

    def metric(self, name):
        return [report.metrics[name] for report in self.reports if name in report.metrics]


class Words:
    """A policy whose answer depends on the seed, the place and the member, and on nothing else."""

    version = 0

    def generate(self, prompts, *, n=1, seed=None, first=0):
        return [
            [self._answer(prompt, Random(f"{seed}/{place}/{member}")) for member in range(n)]
            for place, prompt in enumerate(prompts, first)
        ]

    def reload(self, path):
        self.version = int(path.name)

    def _answer(self, prompt, random):
        text = random.choice(["yes", "no"])
        tokens = [*text.encode(), 0]
        return Completion(
            prompt_tokens=[*prompt.encode()],
            tokens=tokens,
            logprobs=[-0.5] * len(tokens),
            text=text,
            stop_reason=StopReason.STOP_TOKEN,
            sampling=Sampling(),
            version=self.version,
        )


class Circle:
    """A feed, and a trainer that only counts its versions."""

    def __init__(self, *, workers=3, poison=frozenset(), promptness=0.2, late_seed=0, **options):
        self.policy = Words()
        self.options = FeedOptions(groups_per_step=GROUPS, group_size=2, **options)
        self.buffer = Buffer(self.options.staleness)
        self.executor = LateExecutor(
            self.policy,
            Scorer(Rewards(lambda completion: len(completion))),
            workers=workers,
            seed=late_seed,
            promptness=promptness,
            poison=poison,
        )
        self.feed = RolloutFeed(TaskSource(numbered()), self.executor, self.buffer, self.options)
        self.trained, self.metrics, self.ages = [], [], []
        self.replaced = 0

    def run(self, *, first=0, until=None):
        for step in range(first, until or self.options.steps):
            arrived = self.feed.fill(step, step)
            self.replaced += arrived.metrics.get("refill/dropped", 0)
            groups = self.buffer.take(step, GROUPS)
            ages = [step - group.version for group in groups]
            assert ages and 0 <= min(ages) <= max(ages) <= self.options.staleness
            self.ages += ages
            self.trained.append([group.task.id for group in groups])
            self.metrics.append(self.feed.metrics())
            self.feed.follow(step + 1, Path(str(step + 1)))
        return self

    def resumed(self, **changes):
        """A circle in a new process, from a checkpoint of this one."""
        other = Circle(**changes)
        state = json.loads(json.dumps(self.feed.state()))
        other.feed.follow(self.policy.version, Path(str(self.policy.version)))
        other.feed.restore(state)
        return other

    @property
    def ids(self):
        return [one for ids in self.trained for one in ids]

    @property
    def left(self):
        """How many groups are in the buffer or in flight."""
        state = self.feed.state()
        rounds = sum(one["count"] + len(one["sampled"]) for one in state["feed"]["rounds"])
        return len(state["buffer"]["groups"]) + rounds

    @property
    def dropped(self):
        return self.total("buffer/dropped")

    def total(self, name):
        return sum(metrics[name] for metrics in self.metrics)


def draws_of(circle):
    """Return the seed and the place of each task."""
    return {
        task.id: (job.seed, job.first + place)
        for job in circle.executor.submitted
        for place, task in enumerate(job.tasks)
    }


BOUNDS = [
    {"max_staleness": 0},
    {"max_staleness": 1},
    {"max_staleness": 4},
    {"max_staleness": 1, "steps_per_generation": 2},
    {"max_staleness": 3, "steps_per_generation": 2},
    {"max_staleness": 0, "refill_rounds": 3},
    {"max_staleness": 3, "refill_rounds": 3},
]


@pytest.mark.proves("F17")
@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
def test_what_is_sampled_is_trained_on_once_or_counted_and_never_more_than_the_bound(bounds):
    bound, dropped, oldest = bounds["max_staleness"], 0, 0
    for late_seed in range(6):
        circle = Circle(steps=12, late_seed=late_seed, promptness=0.1, **bounds).run()
        assert circle.executor.most_groups <= (bound + 1) * GROUPS
        given = [task.id for job in circle.executor.submitted for task in job.tasks]
        assert len(given) == len({*given}) and len(circle.ids) == len({*circle.ids})
        gone = circle.dropped + circle.replaced
        assert len(given) == len(circle.ids) + gone + circle.left
        dropped, oldest = dropped + circle.dropped, max(oldest, *circle.ages)
    # Workers this late use the whole bound, and more.
    assert oldest == bound
    assert (dropped > 0) == (bound > bounds.get("steps_per_generation", 1) - 1)


@pytest.mark.parametrize("rounds", [1, 3])
def test_a_run_resumed_with_generations_in_flight_trains_on_every_group_once(rounds):
    options = {"max_staleness": 5, "promptness": 0.25, "refill_rounds": rounds, "steps": 12}
    for late_seed, stop in enumerate((1, 4, 7, 11)):
        stopped = Circle(late_seed=late_seed, **options).run(until=stop)
        resumed = stopped.resumed(late_seed=late_seed + 50, workers=2, **options)
        assert resumed.executor.submitted
        resumed.run(first=stop)
        ids = stopped.ids + resumed.ids
        assert len(ids) == len({*ids})
        # Nothing is lost: what was given out is trained on, counted, or still there.
        given = {*draws_of(stopped), *draws_of(resumed)}
        gone = [one.dropped + one.replaced for one in (stopped, resumed)]
        assert len(given) == len(ids) + sum(gone) + resumed.left


def test_every_task_is_sampled_with_the_seed_that_a_synchronous_run_gives_it():
    synchronous = draws_of(Circle(steps=6, max_staleness=0, workers=1).run())
    assert len(synchronous) == 6 * GROUPS
    # Groups that are dropped are replaced by groups of further tasks.
    assert draws_of(Circle(steps=6, max_staleness=3).run()).items() >= synchronous.items()
    stopped = Circle(steps=6, max_staleness=3).run(until=2)
    resumed = stopped.resumed(steps=6, max_staleness=3).run(first=2)
    assert (draws_of(stopped) | draws_of(resumed)).items() >= synchronous.items()


def test_a_checkpoint_that_knows_nothing_of_generations_in_flight_is_resumed():
    stopped = Circle(steps=4, max_staleness=0).run(until=2)
    state = stopped.feed.state()
    del state["feed"]
    resumed = Circle(steps=4, max_staleness=0)
    resumed.feed.follow(2, Path("2"))
    resumed.feed.restore(state)
    resumed.run(first=2)
    straight = Circle(steps=4, max_staleness=0).run()
    assert draws_of(stopped) | draws_of(resumed) == draws_of(straight)


@pytest.mark.proves("F17")
def test_workers_that_do_not_follow_the_trainer_end_the_run():
    circle = Circle(steps=4, max_staleness=2)
    circle.policy.reload = lambda path: None
    with pytest.raises(TrainingError, match=r"still generates with version 0"):
        circle.run()
    circle.executor.follow = lambda version, published: None
    with pytest.raises(TrainingError, match=r"version 0, although the trainer had version \d when"):
        circle.run(first=1)


def test_an_executor_that_loses_jobs_ends_the_run():
    circle = Circle(steps=4, max_staleness=1)
    circle.executor.completed = lambda *, wait: []
    with pytest.raises(TrainingError, match=r"4 jobs have not ended, but .* LateExecutor returned"):
        circle.run()


def test_a_task_that_is_given_up_is_counted_and_its_group_is_missing():
    circle = Circle(steps=4, max_staleness=1, poison=frozenset("0345")).run()
    assert circle.total("workers/given_up") == 4
    # A step without any groups is not taken, but sampled again.
    assert all(circle.trained) and not {*"0345"} & {*circle.ids}


def test_metrics_say_who_waits_for_whom():
    circle = Circle(steps=6, max_staleness=2).run()
    names = {
        "workers/queued",
        "workers/idle",
        "workers/given_up",
        "workers/ended",
        "buffer/dropped",
    }
    assert all(names == metrics.keys() for metrics in circle.metrics)
    assert all(0 <= metrics["workers/idle"] <= 1 for metrics in circle.metrics)
    assert max(metrics["workers/queued"] for metrics in circle.metrics) > 0
    # What the watchdog says of a step that takes too long.
    assert all("waiting for groups of the workers" in text for text in circle.executor.waits)


def test_a_bound_below_the_steps_of_a_generation_is_an_error_that_says_what_to_set():
    with pytest.raises(ConfigError, match="max_staleness to at least 2, or steps_per_generation"):
        FeedOptions(
            steps=1, groups_per_step=1, group_size=2, steps_per_generation=3, max_staleness=1
        )


def test_a_curriculum_is_refused_if_workers_run_ahead():
    source = TaskSource(MixedTaskCurriculum(numbered()))
    options = {"steps": 1, "groups_per_step": 1, "group_size": 2, "steps_per_generation": 2}
    with scorer_of(varied) as scorer:
        executor = InProcessExecutor(Words(), scorer)
        RolloutFeed(source, executor, Buffer(), FeedOptions(max_staleness=1, **options))
        with pytest.raises(ConfigError, match="Set max_staleness to 1, or train on a plain"):
            RolloutFeed(source, executor, Buffer(), FeedOptions(max_staleness=2, **options))


class InOrder(InProcessExecutor):
    """Divides a generation as three workers would, and plays the parts in order."""

    workers = 3


def rows_of(run):
    return [
        {n: v for n, v in report.metrics.items() if not n.startswith(MEASURED)}
        for report in run.reports
    ]


def assert_same_bits(run, other):
    assert rows_of(run) == rows_of(other)
    ours, theirs = run.adapters.parameters(), other.adapters.parameters()
    assert all(mx.array_equal(ours[name], theirs[name]) for name in ours)


def test_jobs_out_of_order_give_the_numbers_of_a_run_in_one_process(load_tiny, tmp_path):
    """Rounding depends on the rows of a batch, so equal bits need jobs of the same tasks."""
    alone = Run(load_tiny, tmp_path / "alone", workers=0).train(steps=3)
    late = Run(load_tiny, tmp_path / "late", workers=1).train(steps=3, max_staleness=0)
    assert_same_bits(alone, late)
    ordered = Run(load_tiny, tmp_path / "ordered", workers=0)
    ordered.executor = InOrder(ordered.policy, ordered.scorer)
    ordered.train(steps=3)
    mixed = Run(load_tiny, tmp_path / "mixed", workers=3).train(steps=3, max_staleness=0)
    assert_same_bits(ordered, mixed)
    sampled = [
        [[rollout.tokens for rollout in group.rollouts] for group in run.reports[0].trained]
        for run in (alone, mixed)
    ]
    assert sampled[0] == sampled[1]
    # Only runs with workers report workers.
    own = {name for name in alone.reports[0].metrics if name.startswith(MEASURED)}
    theirs = {name for name in late.reports[0].metrics if name.startswith(MEASURED)}
    assert {"time/generate", "time/reward", "memory/peak_generate_gb"} == own - theirs
    assert theirs - own == {"time/wait", "trainer/idle", "buffer/dropped"} | {
        f"workers/{name}" for name in ("queued", "idle", "given_up", "ended")
    }


@pytest.mark.slow
def test_stale_groups_of_a_run_are_dropped_and_a_resumed_run_trains_on_no_task_twice(
    load_tiny, tmp_path
):
    stopped = Run(load_tiny, tmp_path, promptness=0.3).train(until=5, steps=9, max_staleness=1)
    facts = stopped.checkpoints.newest().facts
    assert facts["feed"]["rounds"]
    resumed = Run(load_tiny, tmp_path, promptness=0.3, seed=1)
    resumed.train(resume=True, steps=9, max_staleness=1)
    assert [report.metrics["version"] for report in stopped.reports + resumed.reports] == [
        *range(1, 10)
    ]
    for report in stopped.reports + resumed.reports:
        assert all(0 <= report.step - group.version <= 1 for group in report.trained)
    trained = stopped.trained + resumed.trained
    assert len(trained) == len({*trained})
    # Workers know the version before their first job, also after a resume.
    assert stopped.executor.followed == [(0, 0), *stopped.executor.followed[1:]]
    assert resumed.executor.followed[0] == (5, 0)
    dropped = sum(stopped.metric("buffer/dropped") + resumed.metric("buffer/dropped"))
    assert dropped == resumed.checkpoints.newest().facts["buffer"]["dropped"] > 0
