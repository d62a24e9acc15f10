"""Rewards in processes of their own work while the model still writes."""

import time
from contextlib import closing

import pytest

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

def sleepy(completion):
    time.sleep(0.3)
    return 1.0

@textpolicy.reward(batched=True)
def together(completions):
    return [0.0 for _ in completions]

def failing(completion):
    if completion == "ready?":
        return 1.0
    raise ValueError("no such answer")

def second(completion):
    time.sleep(1)
    return 1.0
"""


@pytest.fixture
def found(tmp_path):
    """A function from a name to the reward of that name, in a file of its own."""
    (tmp_path / "mine.py").write_text(SOURCE)
    return lambda name: load_reward(f"{tmp_path}/mine.py:{name}")


class Timed(ModelPolicy):
    """Also says when its last rollout was written."""

    ended = 0.0

    def converse(self, *args, **options):
        turns = super().converse(*args, **options)
        self.ended = time.time()
        return turns


def policy_of(load_tiny):
    model, tokenizer = load_tiny()
    # A group at a time, so that there are many moments at which some are written.
    return Timed(model, tokenizer, Sampling(max_tokens=12), seed=0, max_rows=4)


def tasks_of(folder):
    example = {"file": str(folder / "calls")}
    return [Task(id=str(n), prompt=f"{n}+{n}=", example=example) for n in range(8)]


def test_scores_begin_before_everything_is_written_and_are_those_of_afterwards(
    load_tiny, found, tmp_path
):
    policy, tasks, noted = policy_of(load_tiny), tasks_of(tmp_path), found("noted")
    after = collect(tasks, policy, noted, group_size=4, seed=3)
    (tmp_path / "calls").unlink()
    with closing(Scorer(Rewards(noted, timeout=20.0, workers=2))) as scorer:
        # Starting its processes takes longer than all of the writing.
        scorer.score([sample_of("p", "ready?", {"file": str(tmp_path / "others")})] * 2)
        meanwhile = collect(tasks, policy, scorer, group_size=4, seed=3)
    assert meanwhile == after
    calls = [float(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert len(calls) == 32 and min(calls) < policy.ended


def test_only_what_was_waited_for_counts_as_seconds_of_rewards(found):
    sample = sample_of("p", "c", {})
    with closing(Scorer(Rewards(found("sleepy"), timeout=20.0, workers=1))) as scorer:
        scorer.prepare([sample.example])
        with closing(BackgroundScorer[int](scorer)) as early:
            early.add(0, sample)
            time.sleep(3)
            assert early.verdicts()[0].value == 1.0
            assert scorer.seconds < 0.1
            early.add(1, sample)
            assert set(early.verdicts()) == {0, 1}
            assert scorer.seconds > 0.2


def test_a_failure_ends_the_writing_too(load_tiny, found, tmp_path):
    policy = policy_of(load_tiny)
    with closing(Scorer(Rewards(found("failing"), timeout=20.0, workers=1))) as scorer:
        scorer.score([sample_of("p", "ready?", {})])
        with pytest.raises(RewardError, match="no such answer"):
            collect(tasks_of(tmp_path), policy, scorer, group_size=4, seed=3)
    assert policy.ended == 0


def test_what_is_broken_off_leaves_no_scoring_behind(found):
    with closing(Scorer(Rewards(found("second"), timeout=20.0, workers=1))) as scorer:
        scorer.score([sample_of("p", "c", {})])
        scorer.prepare([{}])
        early = BackgroundScorer[int](scorer)
        for number in range(20):
            early.add(number, sample_of("p", str(number), {}))
        started = time.perf_counter()
        early.close()
        assert time.perf_counter() - started < 2
        # And the next step begins anew.
        assert [verdict.value for verdict in scorer.score([sample_of("p", "c", {})])] == [1.0]


def test_no_process_is_idle_for_a_first_sample_that_came_alone(found):
    with closing(Scorer(Rewards(found("second"), timeout=20.0, workers=4))) as scorer:
        scorer.score([sample_of("p", "c", {}) for _ in range(4)])
        scorer.prepare([{}])

        def score():
            with closing(BackgroundScorer[int](scorer)) as early:
                for number in range(4):
                    early.add(number, sample_of("p", str(number), {}))
                    time.sleep(0.05)
                assert len(early.verdicts()) == 4

        # One after the other they would take four seconds, and in two waves two.
        assert least_seconds(score, below=1.9) < 1.9


def test_an_incident_is_told_once_however_many_calls_a_step_takes(found):
    told = []
    rewards = Rewards(found("failing"), timeout=20.0, on_error="skip", max_error_rate=1.0)
    samples = [sample_of("p", str(number), {}) for number in range(3)]
    with closing(Scorer(rewards, on_incident=told.append)) as scorer:
        for step in (1, 2):
            scorer.prepare([sample.example for sample in samples])
            for sample in samples:
                scorer.score_prepared([sample])
            assert len(told) == step - 1
            scorer.report_incidents()
            assert len(told) == step
    assert told[0].more == 2 and "completion '0'" in told[0].error


def test_rewards_of_a_whole_batch_wait_for_all_of_it(found):
    def overlaps(*functions, **options) -> bool:
        with closing(Scorer(Rewards([*functions], **options))) as scorer:
            return scorer.can_overlap_decoding

    assert overlaps(found("sleepy"), timeout=1.0)
    assert not overlaps(found("sleepy"))
    assert not overlaps(found("sleepy"), found("together"), timeout=1.0)
