"""A worker that takes the versions of the trainer while it plays a job."""

import time
from contextlib import closing
from itertools import count, islice

import numpy as np
import pytest

from tests.adapter_versions import AdapterVersions
from tests.rollout.executors import builders
from textpolicy.environments import load
from textpolicy.rollout.executors.crew import Crew
from textpolicy.rollout.executors.executor import RolloutJob
from textpolicy.rollout.executors.spawned import SpawnedWorkers


@pytest.mark.slow  # A worker's process starts.
def test_a_spawned_worker_takes_versions_between_tokens_and_says_which_token_is_of_which(
    load_tiny, tmp_path
):
    versions = AdapterVersions(load_tiny()[0], tmp_path, 20)
    tasks = list(islice(load("add").stream(0), 64))
    job = RolloutJob(number=0, tasks=tasks, group_size=4, seed=1)
    with closing(Crew(SpawnedWorkers(builders.swapping_worker), 1, tmp_path / "crew")) as crew:
        crew.follow(0, versions.files[0])
        crew.submit(job)
        (first,) = crew.completed(wait=True)
        # The worker is built, and the next job is played while versions arrive.
        crew.submit(job)
        numbers, finished = count(1), []
        while not finished:
            finished = crew.completed(wait=False)
            if (version := next(numbers)) < len(versions.files):
                crew.follow(version, versions.files[version])
                time.sleep(0.005)
    (second,) = finished
    assert not any(one.versions for group in first.groups for one in group.rollouts)
    rollouts = [one for group in second.groups for one in group.rollouts]
    mixed = [one for one in rollouts if len(one.sampled_by_version) > 1]
    assert mixed
    assert all(one.version == min(one.sampled_by_version) for one in rollouts)
    for one in mixed[:3]:
        (segment,) = one.segments
        expected = versions.replay(segment, temperature=one.sampling.temperature)
        assert np.allclose(segment.logprobs, expected, atol=1e-4)
