"""Short runs in other processes, for tests that kill the process or send it signals.

The processes are forked from a server that has done the slow imports but has not imported mlx,
because threads of mlx do not survive a fork. Each process starts in a quarter of a second.
"""

import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from multiprocessing import get_context, set_start_method
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from random import Random
from typing import Any

STEPS, GROUPS, GROUP_SIZE = 5, 4, 4
SLOW_IMPORTS = ["numpy", "pytest", "transformers", "transformers.models.auto.tokenization_auto"]

context = get_context("forkserver")
context.set_forkserver_preload(SLOW_IMPORTS)


def start(target: Callable[..., None], *args: Any) -> BaseProcess:
    """Start a process that runs `target`. It ends at the latest when this process ends."""
    process = context.Process(target=target, args=args, daemon=True)
    process.start()
    return process


def start_command(
    arguments: Sequence[str],
    log: Path,
    instant: "Instant | None" = None,
    prepare: Callable[[], None] | None = None,
) -> tuple[BaseProcess, Connection]:
    """Start `textpolicy` in a process, and return it with the connection that `command` sends to.

    Unlike `start`, the process may have child processes of its own.
    """
    hear, say = context.Pipe(duplex=False)
    process = context.Process(
        target=command, args=(arguments, log, say, instant, prepare or do_nothing)
    )
    process.start()
    say.close()
    return process, hear


@dataclass(frozen=True)
class Instant:
    """The `number`-th time, from 1, that a run does something. It then gets the signal.

    `deed` is an event that user code announces by `sys.audit`, or a part of the path of a file
    that the run opens.
    """

    deed: str
    number: int
    signal: signal.Signals


def exit_code_of(process: BaseProcess) -> int:
    """Wait for the process, and return its exit code, or minus the signal that killed it."""
    process.join(300)
    assert process.exitcode is not None, "still running after five minutes"
    return process.exitcode


def do_nothing() -> None:
    """Do nothing."""


def let_the_clock_jump() -> None:
    """Let the clock of the day jump by up to a year, back and forth, at every look at it."""
    real, days = time.time, Random(0)
    time.time = lambda: real() + days.uniform(-3e7, 3e7)


def fork_by_default() -> None:
    """Make fork the way in which processes are started, unless the caller says another."""
    set_start_method("fork", force=True)


def train(
    folder: Path,
    options: Mapping[str, Any],
    observe: Callable[[Any], Any] = lambda report: None,
    before_reward: Callable[[], None] = do_nothing,
) -> None:
    """Train for `STEPS` steps in the folder, from its newest checkpoint if there is one."""
    from textpolicy.adapters import AdapterConfig, AdapterContainer, shared_copy
    from textpolicy.algorithms import grpo
    from textpolicy.environments import load
    from textpolicy.generation.mlx_generation import create_policy, load_model
    from textpolicy.loop import train_rl
    from textpolicy.runs import RunDirectory
    from textpolicy.tracking.jsonl import RunFiles
    from textpolicy.training.checkpoint import Checkpoints
    from textpolicy.training.optimizer import build_optimizer
    from textpolicy.training.trainer import Trainer

    run = RunDirectory(folder)
    options = dict(options)
    per_generation = options.pop("steps_per_generation", 1)
    model, tokenizer = load_model("tiny")
    adapters = AdapterContainer.from_model(model, AdapterConfig(rank=2), seed=1)
    adapters.publish_path = run.latest
    policy = create_policy(shared_copy(model), tokenizer, {"max_tokens": 4})
    optimizer = build_optimizer(1e-2, schedule="cosine", warmup=2, updates=40)
    trainer = Trainer(
        model, grpo.compute_advantages, grpo.policy_loss, optimizer, seed=5, **options
    )
    environment = load("add")
    folder.mkdir(exist_ok=True)
    with run.lock():
        run.remove_partial_files()
        checkpoints = Checkpoints(run.checkpoints)
        resume = checkpoints.newest()
        resume_step = resume.step if resume else 0
        with closing(RunFiles(run.metrics, resume_step=resume_step)) as rows:

            def on_step(report: Any) -> Any:
                rows.write(report.step, report.metrics)
                return observe(report)

            def reward(prompt: str, completion: str, example: Mapping[str, Any]) -> float:
                before_reward()
                return environment.reward(prompt, completion, example)

            train_rl(
                tasks=environment.stream(0),
                reward=reward,
                policy=policy,
                trainer=trainer,
                steps=STEPS,
                groups_per_step=GROUPS,
                group_size=GROUP_SIZE,
                steps_per_generation=per_generation,
                seed=3,
                on_step=on_step,
                checkpoints=checkpoints,
                resume=resume,
            )


def command(
    arguments: Sequence[str],
    log: Path,
    connection: Connection,
    instant: Instant | None,
    prepare: Callable[[], None],
) -> None:
    """Run `textpolicy` in a process group of its own, and write to `log` what it prints.

    Sends "locked" as soon as the run takes its lock, and sends itself the signal at the instant.
    """
    os.setpgid(0, 0)
    with log.open("w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    # A shell may have started the tests with Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    times = count(1)

    def watch(event: str, facts: tuple[Any, ...]) -> None:
        deed = str(facts[0]) if event == "open" else event
        if event == "open" and deed.endswith(".running"):
            connection.send("locked")
        if instant and instant.deed in deed and next(times) == instant.number:
            os.kill(os.getpid(), instant.signal)

    sys.addaudithook(watch)
    prepare()
    from textpolicy.cli import main

    raise SystemExit(main(arguments))


def train_until_step(folder: Path, options: Mapping[str, Any], step: int) -> None:
    """Train until the callback stops the run after `step` steps."""
    from textpolicy.types import Progress

    train(folder, options, lambda r: Progress.STOP if r.step + 1 == step else Progress.MORE)


def train_until_call(
    folder: Path, options: Mapping[str, Any], calls: Sequence[str], number: int, after: bool
) -> None:
    """Train, and kill this process before or after the `number`-th of these calls of `os`."""
    numbers = count(1)

    def killing(call: Callable[..., Any]) -> Callable[..., Any]:
        def made(*args: Any, **named: Any) -> Any:
            last = next(numbers) == number
            if last and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return call(*args, **named)
            finally:
                if last:
                    os.kill(os.getpid(), signal.SIGKILL)

        return made

    for name in calls:
        setattr(os, name, killing(getattr(os, name)))
    train(folder, options)


def train_until_byte(folder: Path, options: Mapping[str, Any], size: int) -> None:
    """Train until the system kills the process, when a file would grow beyond `size` bytes."""
    # By default Python ignores this signal, and writing raises an error instead.
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    _limit_file_size(size)
    train(folder, options)


def train_on_a_full_disk(
    folder: Path, options: Mapping[str, Any], size: int, connection: Connection
) -> None:
    """Train where no file can grow beyond `size` bytes, and send the error."""
    from textpolicy.errors import TextPolicyError

    _limit_file_size(size)
    try:
        train(folder, options)
    except TextPolicyError as error:
        connection.send(f"{type(error).__name__}: {error}")


def _limit_file_size(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def train_and_wait_for_signals(
    folder: Path, options: Mapping[str, Any], hold: bool, connection: Connection
) -> None:
    """Train, and send the number of each step and the announcements of signals.

    The first reward of the third step waits for a message, and with `hold` then computes for
    minutes.
    """
    from textpolicy.cli.signals import stopping
    from textpolicy.types import Progress

    rewards = count()

    def before_reward() -> None:
        if next(rewards) == 2 * GROUPS * GROUP_SIZE:
            connection.send("in the third step")
            connection.recv()
            if hold:
                _compute_for_minutes()

    # A shell may have started the tests with Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with stopping(connection.send) as request:

        def observe(report: Any) -> Any:
            connection.send(report.step + 1)
            return Progress.STOP if request.signal else Progress.MORE

        train(folder, options, observe, before_reward)
    raise SystemExit(request.exit_code)


def wait_without_a_terminal(connection: Connection) -> None:
    """Wait for signals, whose announcement fails because the terminal is gone."""
    from textpolicy.cli.signals import stopping

    def announce(line: str) -> None:
        connection.send(line)
        raise BrokenPipeError

    with stopping(announce):
        connection.send("waiting")
        connection.poll(None)


def _compute_for_minutes() -> None:
    import mlx.core as mx

    x = mx.full((2000, 2000), 1 / 2000)
    for _ in range(20_000):
        x = x @ x
    mx.eval(x)
