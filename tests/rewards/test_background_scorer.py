"""Rewards in other processes score finished completions while the model decodes the rest."""

import time
from contextlib import closing

import pytest

from tests.rewards.scoring_calls import samples
from tests.timing import least_seconds
from textpolicy.errors import RewardError
from textpolicy.generation.policy import ModelPolicy
from textpolicy.rewards import Rewards, Scorer, load_reward, sample_of
from textpolicy.rewards.scorer import BackgroundScorer
from textpolicy.rollout.worker import collect
from textpolicy.types import Sampling, Task

SOURCE = """
import time
import textpolicy

def noted(completion, example):
    with open(example["file"], "a") as file:
        file.write(f"{time.time()}\\n")
    return float(len(completion))

def sleeps(completion):
    time.sleep(float(completion))
    return 1.0

@textpolicy.reward(batched=True)
def together(completions):
    return [0.0 for _ in completions]

def failing(completion):
    if completion == "ready?":
        return 1.0
    raise ValueError("no such answer")
"""


@pytest.fixture
def load(write_rewards):
    """A function that loads a reward of the file above by its name."""
    path = write_rewards(SOURCE)
    return lambda name: load_reward(f"{path}:{name}")


class TimedPolicy(ModelPolicy):
    """A policy that notes when its last rollout was finished."""

    ended = 0.0

    def converse(self, *args, **options):
        turns = super().converse(*args, **options)
        self.ended = time.time()
        return turns


def policy_of(load_tiny, max_tokens=12):
    model, tokenizer = load_tiny()
    # One group at a time, so that completions finish at different times.
    return TimedPolicy(model, tokenizer, Sampling(max_tokens=max_tokens), seed=0, max_rows=4)


def tasks_of(folder):
    example = {"file": str(folder / "calls")}
    return [Task(id=str(n), prompt=f"{n}+{n}=", example=example) for n in range(4)]


@pytest.mark.slow
def test_scoring_starts_before_decoding_ends_and_gives_the_same_rollouts(load_tiny, load, tmp_path):
    policy, tasks, noted = policy_of(load_tiny), tasks_of(tmp_path), load("noted")
    scored_after = collect(tasks, policy, noted, group_size=4, seed=3)
    (tmp_path / "calls").unlink()
    with closing(Scorer(Rewards(noted, timeout=20.0, workers=2))) as scorer:
        # Starting the processes takes longer than all of the decoding.
        scorer.score([sample_of("p", "ready?", {"file": str(tmp_path / "others")})] * 2)
        scored_meanwhile = collect(tasks, policy, scorer, group_size=4, seed=3)
    assert scored_meanwhile == scored_after
    calls = [float(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert len(calls) == 16 and min(calls) < policy.ended


@pytest.mark.slow
def test_only_the_time_that_verdicts_waits_counts_as_seconds_of_rewards(load):
    (sample,) = samples("0.4")
    with closing(Scorer(Rewards(load("sleeps"), timeout=20.0, workers=1))) as scorer:
        scorer.score(samples("0"))
        scorer.seconds = 0.0
        scorer.prepare([{}])
        with closing(BackgroundScorer[int](scorer)) as background:
            background.add(0, sample)
            time.sleep(0.8)
            assert background.verdicts()[0].value == 1.0
            assert scorer.seconds < 0.3
            background.add(1, sample)
            assert set(background.verdicts()) == {0, 1}
            assert scorer.seconds > 0.3


def test_a_failure_ends_the_decoding_too(load_tiny, load, tmp_path):
    # Completions that are long enough to be decoding still when a call fails.
    policy = policy_of(load_tiny, max_tokens=1000)
    with closing(Scorer(Rewards(load("failing"), timeout=20.0, workers=1))) as scorer:
        scorer.score(samples("ready?"))
        with pytest.raises(RewardError, match="no such answer"):
            collect(tasks_of(tmp_path), policy, scorer, group_size=4, seed=3)
    assert policy.ended == 0


def test_closing_early_leaves_no_scoring_behind(load):
    with closing(Scorer(Rewards(load("sleeps"), timeout=20.0, workers=1))) as scorer:
        scorer.score(samples("0"))
        scorer.prepare([{}])
        background = BackgroundScorer[int](scorer)
        for number, sample in enumerate(samples(*["1"] * 20)):
            background.add(number, sample)
        started = time.perf_counter()
        background.close()
        assert time.perf_counter() - started < 2
        # The next step is scored as usual.
        assert [verdict.value for verdict in scorer.score(samples("0"))] == [1.0]


@pytest.mark.slow
def test_no_process_is_idle_because_a_first_sample_came_alone(load):
    with closing(Scorer(Rewards(load("sleeps"), timeout=20.0, workers=4))) as scorer:
        scorer.score(samples(*["0.2"] * 4))
        scorer.prepare([{}])

        def score():
            with closing(BackgroundScorer[int](scorer)) as background:
                for number, sample in enumerate(samples(*["0.5"] * 4)):
                    background.add(number, sample)
                    time.sleep(0.02)
                assert len(background.verdicts()) == 4

        # The four would take 2 seconds one after the other, and 1 second in two waves.
        assert least_seconds(score, below=0.95) < 0.95


def test_an_incident_is_reported_once_for_all_calls_of_a_step(load):
    reported = []
    rewards = Rewards(load("failing"), timeout=20.0, on_error="skip", max_error_rate=1.0)
    failing = samples("0", "1", "2")
    with closing(Scorer(rewards, on_incident=reported.append)) as scorer:
        for step in (1, 2):
            scorer.prepare([sample.example for sample in failing])
            for sample in failing:
                scorer.score_prepared([sample])
            assert len(reported) == step - 1
            scorer.report_incidents()
            assert len(reported) == step
    assert reported[0].more == 2 and "completion '0'" in reported[0].error


def test_batched_rewards_cannot_overlap_decoding(load):
    def overlaps(*functions, **options):
        with closing(Scorer(Rewards([*functions], **options))) as scorer:
            return scorer.can_overlap_decoding

    assert overlaps(load("sleeps"), timeout=1.0)
    assert not overlaps(load("sleeps"))
    assert not overlaps(load("sleeps"), load("together"), timeout=1.0)
