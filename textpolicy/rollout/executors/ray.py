"""Rollout workers as Ray actors, on this machine or on the machines of a Ray cluster.

Ray starts actors, carries messages and notices lost machines. Everything else is the crew's: Ray
itself restarts no actor and repeats no call, because a restarted actor has lost its adapters, and a
repeated job could end one worker after the other.
"""

import socket
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

from textpolicy.config.train import LOCAL_RAY
from textpolicy.errors import ConfigError
from textpolicy.rollout.executors.local_ray import LocalRay, import_ray
from textpolicy.rollout.executors.ray_host import Surroundings, WorkerHost
from textpolicy.rollout.executors.spawned import BuildWorker, pack_build, pack_job
from textpolicy.rollout.executors.worker_link import (
    PublishedVersion,
    SentJob,
    WorkerAnswer,
    WorkerEndedError,
    answer_from_json,
)
from textpolicy.user_code import keep_process_state

RESOURCE = "textpolicy_worker"
"""The custom resource of machines that says how many workers each may hold."""
_ACTORS_OF_CREWS = {"max_restarts": 0, "max_task_retries": 0, "scheduling_strategy": "SPREAD"}
_CONNECT_SECONDS, _CLOSE_SECONDS = 10.0, 3.0
_LONGEST_REASON = 300


class RayWorkers:
    """A `Transport` whose workers are Ray actors, each made by `build` on its machine.

    `address` is the HOST:PORT of a Ray cluster that this machine belongs to; "local" starts Ray
    here. Raise `ConfigError` if the cluster has no room for `workers` actors.
    """

    def __init__(self, build: BuildWorker, workers: int, address: str = LOCAL_RAY) -> None:
        self._packed = pack_build(build)
        self._local = LocalRay(workers) if address == LOCAL_RAY else None
        self._newest: tuple[PublishedVersion, Any] | None = None
        self._ray = import_ray()
        try:
            _connect(self._ray, self._local.address if self._local else address)
            options = _ACTORS_OF_CREWS | _room_for(workers, self._ray.cluster_resources())
        except ConfigError:
            self.close()
            raise
        self._host = self._ray.remote(**options)(WorkerHost)

    def start(self, number: int) -> "RayLink":
        return RayLink(self, self._host.remote(self._packed, Surroundings.here()))

    def wait(self, links: Sequence["RayLink"], seconds: float) -> None:
        self._ray.wait([link.hearing for link in links], num_returns=1, timeout=seconds)

    def close(self) -> None:
        """Leave the cluster, or end the Ray that was started here."""
        self._ray.shutdown()
        if self._local:
            self._local.close()

    def stored(self, published: PublishedVersion) -> Any:
        """Return Ray's object of a version, which all machines can fetch."""
        if self._newest is None or self._newest[0] != published:
            self._newest = published, self._ray.put(published.path.read_bytes())
        return self._newest[1]


class RayLink:
    """The `WorkerLink` of an actor. `hearing` is Ray's object of the answers that come next."""

    def __init__(self, transport: RayWorkers, host: Any) -> None:
        self._transport = transport
        self._ray = import_ray()
        self._host = host
        self._numbers = count()
        self._has_answered = False
        self.hearing = host.hear.remote()

    def follow(self, published: PublishedVersion) -> None:
        version, digest = published.version, published.sha256
        content = self._transport.stored(published)
        self._host.follow.remote(next(self._numbers), version, digest, content)

    def play(self, job: SentJob) -> None:
        self._host.play.remote(next(self._numbers), pack_job(job))

    def answers(self) -> Iterator[WorkerAnswer]:
        while self._ray.wait([self.hearing], timeout=0)[0]:
            try:
                messages, ended = self._ray.get(self.hearing)
            except self._ray.exceptions.RayError as error:
                raise WorkerEndedError(_how_an_actor_ended(error)) from error
            self._has_answered = True
            if ended is None:
                self.hearing = self._host.hear.remote()
            yield from map(answer_from_json, messages)
            if ended is not None:
                raise WorkerEndedError(ended)

    def end(self) -> None:
        if self._has_answered:
            # The machine then keeps no files. An actor that has ended already fails at once.
            self._ray.wait([self._host.close.remote()], timeout=_CLOSE_SECONDS)
        self._ray.kill(self._host)


def _connect(ray: Any, address: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(
            f"the address of Ray is {address!r}; expected HOST:PORT, such as 127.0.0.1:6379, or "
            f"{LOCAL_RAY!r}"
        )
    try:
        # Ray itself tries for minutes.
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
        # Ray sets a handler of SIGTERM, which would end the run without a checkpoint.
        with keep_process_state():
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ConfigError(
            f"Ray at {address} cannot be joined: {str(error)[:_LONGEST_REASON]}. Start it with "
            "`ray start --head` on one machine and `ray start --address=HOST:PORT` on every other "
            "machine, this one among them"
        ) from error


def _room_for(workers: int, resources: dict[str, float]) -> dict[str, Any]:
    """Return what each worker takes of its machine, as options of an actor."""
    name = RESOURCE if RESOURCE in resources else "CPU"
    room = int(resources.get(name, 0))
    if room < workers:
        raise ConfigError(
            f"workers is {workers}, and the machines of the Ray cluster have {name} for {room}. "
            f"Lower --workers, or add machines with `ray start --address=HOST:PORT`"
        )
    taken: dict[str, Any] = {"num_cpus": 1}
    if name == RESOURCE:
        taken = {"num_cpus": 0, "resources": {RESOURCE: 1}}
    # Ray hides the GPUs of a machine from actors that ask for none.
    return taken | ({"num_gpus": 1} if resources.get("GPU", 0) >= workers else {})


def _how_an_actor_ended(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason, *_ = lines[-1].split(". ") if lines else [repr(error)]
    return f"was lost with its Ray actor ({reason[:_LONGEST_REASON]})"
