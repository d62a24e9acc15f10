"""What a Ray actor does on its machine, without Ray."""

import asyncio
import socket
from dataclasses import replace

import pytest

from tests.rollout.executors import builders
from textpolicy.environments import load
from textpolicy.errors import AdapterError, ConfigError
from textpolicy.rollout.executors.executor import RolloutJob
from textpolicy.rollout.executors.ray_host import Surroundings, WorkerHost
from textpolicy.rollout.executors.rollout_worker import sha256_of
from textpolicy.rollout.executors.spawned import pack_build, pack_job
from textpolicy.rollout.executors.worker_link import (
    Failed,
    Ready,
    Reloaded,
    answer_from_json,
    send_job,
)
from textpolicy.rollout.worker import collect
from textpolicy.types import Task

HERE = f"on the machine {socket.gethostname()}"


def publish(folder, version):
    """Return the file of adapters that have moved."""
    model, adapters, _ = builders.adapted_model()
    adapters.swap({n: x + 0.02 for n, x in adapters.parameters().items()}, version=version)
    adapters.publish(folder / "adapters.safetensors")
    del model
    return folder / "adapters.safetensors"


async def hear(host, number):
    """Return so many answers, as the trainer reads them."""
    answers = []
    while len(answers) < number:
        messages, ended = await host.hear()
        assert ended is None
        answers += map(answer_from_json, messages)
    return answers


def job_of(tasks):
    return RolloutJob(number=0, tasks=tasks, group_size=2, seed=11)


def host_of(build, surroundings=None):
    return WorkerHost(pack_build(build), surroundings or Surroundings.here())


def test_messages_pass_in_their_order_and_adapters_that_were_damaged_are_refused(tmp_path):
    path = publish(tmp_path, version=3)
    tasks = [next(load("add").stream(5))]

    async def play():
        host = host_of(builders.add_worker)
        await host.play(1, pack_job(send_job(job_of(tasks), 5)))
        await host.follow(0, 3, sha256_of(path), path.read_bytes())
        answers = await hear(host, 3)
        assert list(host._folder.iterdir()) == []
        await host.follow(2, 4, sha256_of(path), path.read_bytes()[:-1] + b"?")
        answers += await hear(host, 1)
        await host.close()
        assert not host._folder.exists()
        return answers

    ready, reloaded, played, failed = asyncio.run(play())
    assert (ready, reloaded, played.number) == (Ready(), Reloaded(3), 5)
    policy = builders.add_policy()
    policy.reload(path)
    (group,) = collect(tasks, policy, load("add").reward, group_size=2, seed=11)
    (rollouts,) = played.rollouts
    assert [(r.tokens, r.logprobs, r.reward, r.version) for r in rollouts] == [
        (r.tokens, r.logprobs, r.reward, 3) for r in group.rollouts
    ]
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, AdapterError)
    assert str(failed.error).startswith(HERE)
    assert "holds other bytes than adapter version 4" in str(failed.error)


@pytest.mark.slow
def test_a_worker_that_ends_says_how_and_where():
    async def listen():
        host = host_of(builders.dying_worker)
        heard = await host.hear()
        await host.close()
        return heard

    assert asyncio.run(listen()) == ([], f"exited with code 9 {HERE}")


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ({"folder": "/no/such/folder"}, "/no/such/folder cannot be entered here: No such file"),
        ({"versions": {"mlx": "0.1", "mlx-lm": None}}, "the trainer has mlx 0.1, mlx-lm not inst"),
    ],
)
def test_a_machine_that_is_not_like_the_trainers_is_refused(other, what):
    async def listen():
        host = host_of(builders.add_worker, replace(Surroundings.here(), **other))
        await host.play(0, pack_job(send_job(job_of([Task(id="1", prompt="2+2")]), 1)))
        (failed,) = await hear(host, 1)
        await host.close()
        return failed.error

    error = asyncio.run(listen())
    assert isinstance(error, ConfigError)
    assert str(error).startswith(HERE)
    assert what in str(error)


def test_a_file_of_the_user_that_is_missing_on_a_machine_is_named(tmp_path):
    packed = pack_build(builders.add_worker)
    missing = str(tmp_path / "reward.py")

    async def listen():
        host = WorkerHost(({"textpolicy_file_77_reward": missing}, packed[1]), Surroundings.here())
        (failed,) = await hear(host, 1)
        await host.close()
        return failed.error

    error = asyncio.run(listen())
    assert str(error).startswith(HERE)
    assert f"{missing!r} does not exist" in str(error)
