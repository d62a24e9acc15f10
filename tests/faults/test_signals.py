"""SIGINT and SIGTERM: the first ends the run after its step, the second at once."""

import os
import signal
import subprocess
import sys
from queue import Queue

import pytest

from tests.faults import killable_runs
from tests.faults.killable_runs import Instant, context, exit_code_of, start
from tests.faults.test_killed import assert_resumes_to_the_same_numbers, whole_run
from tests.faults.test_killed_commands import TRAIN, Runs
from tests.test_resume import MODES
from textpolicy.cli.signals import STOPPING, stopping
from textpolicy.runs import RunDirectory
from textpolicy.training.checkpoint import Checkpoints

__all__ = ["whole_run"]

SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]


class WaitingRun:
    """A run in another process, which waits in its third step for `continue_step`."""

    def __init__(self, folder, *, hold=False):
        self.folder = folder
        self.connection, theirs = context.Pipe()
        self.process = start(
            killable_runs.train_and_wait_for_signals, folder, MODES["on policy"], hold, theirs
        )
        theirs.close()
        assert [self.hear() for _ in range(3)] == [1, 2, "in the third step"]

    def hear(self):
        assert self.connection.poll(300), "no message for five minutes"
        return self.connection.recv()

    def send(self, number):
        os.kill(self.process.pid, number)
        return self

    def continue_step(self):
        self.connection.send(None)


@pytest.mark.proves("F5")
@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_first_signal_ends_the_run_after_the_current_step(
    whole_run, tmp_path, attempts, number, code
):
    run = WaitingRun(tmp_path / "my run").send(number)
    assert run.hear() == (
        f"{number.name}: the run stops after this step and saves a checkpoint. "
        "A second signal ends it at once"
    )
    run.continue_step()
    assert run.hear() == 3
    assert exit_code_of(run.process) == code
    assert Checkpoints(RunDirectory(run.folder).checkpoints).newest().step == 3
    assert_resumes_to_the_same_numbers(run.folder, whole_run, "on policy")
    attempts.add()


@pytest.mark.proves("F5")
@pytest.mark.slow
def test_a_second_signal_ends_the_process_even_during_a_long_computation(
    whole_run, tmp_path, attempts
):
    run = WaitingRun(tmp_path / "run", hold=True)
    run.continue_step()
    run.send(signal.SIGTERM)
    assert "A second signal ends it at once" in run.hear()
    # Python's own handlers wait for the computation, and one signal does not end the process.
    run.process.join(0.5)
    assert run.process.exitcode is None
    run.send(signal.SIGINT)
    run.process.join(60)
    assert run.process.exitcode == 130
    assert_resumes_to_the_same_numbers(run.folder, whole_run, "on policy")
    attempts.add()


@pytest.mark.proves("F5")
@pytest.mark.slow
def test_a_second_signal_ends_the_process_if_the_first_could_not_be_announced(attempts):
    connection, theirs = context.Pipe()
    process = start(killable_runs.wait_without_a_terminal, theirs)
    for expected in ("waiting", "SIGTERM: the run stops"):
        assert connection.poll(300)
        assert connection.recv().startswith(expected)
        os.kill(process.pid, signal.SIGTERM)
    assert exit_code_of(process) == 143
    attempts.add()


def test_a_signal_is_announced_and_the_earlier_handlers_are_restored():
    before = [signal.getsignal(number) for number in STOPPING]
    heard = Queue()
    with stopping(heard.put) as request:
        assert (request.signal, request.exit_code) == (None, 0)
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard.get(timeout=10).startswith("SIGTERM: the run stops after this step")
        assert (request.signal, request.exit_code) == (signal.SIGTERM, 143)
    assert [signal.getsignal(number) for number in STOPPING] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_signal_that_the_process_was_started_to_ignore_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stopping(pytest.fail) as request:
            os.kill(os.getpid(), signal.SIGINT)
        assert request.signal is None
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_signals_go_to_their_own_handlers():
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:
        with stopping(pytest.fail) as request:
            os.kill(os.getpid(), signal.SIGUSR1)
        assert (heard, request.signal) == ([signal.SIGUSR1], None)
    finally:
        signal.signal(signal.SIGUSR1, before)


# Signals during a command: the number of the deed, and the step after which the run must end.
DEEDS = {
    "sampling": ("its reward", 1 + 16 + 2 * 16 + 5, 3),
    "computing advantages": ("its advantages", 2, 2),
    "updating": ("its update", 1, 1),
    "saving an adapter": ("/adapters/.latest", 2, 1),
    "saving a checkpoint": ("/checkpoints/.", 1, 1),
}
USER_CODE = """
import sys
from textpolicy.algorithms import grpo

def reward(completion, example):
    sys.audit("its reward")
    return float(completion.strip()[:1] == str(example["sum"])[:1])

def compute_advantages(rewards):
    sys.audit("its advantages")
    return grpo.compute_advantages(rewards)

def policy_loss(logp, batch):
    sys.audit("its update")
    return grpo.policy_loss(logp, batch)
"""


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """Return runs of `textpolicy train` whose reward and algorithm announce their calls."""
    folder = tmp_path_factory.mktemp("commands")
    (folder / "code.py").write_text(USER_CODE)
    code = str(folder / "code.py")
    return Runs(folder, [*TRAIN, "--reward", f"{code}:reward", "--algorithm", code])


@pytest.mark.proves("F5")
@pytest.mark.long
@pytest.mark.parametrize(("number", "code"), SIGNALS)
@pytest.mark.parametrize("deed", DEEDS)
def test_a_signal_at_any_deed_of_a_command_saves_and_ends_it(
    commands, attempts, deed, number, code
):
    commands.new()
    event, times, step = DEEDS[deed]
    process = commands.start(Instant(event, times, number))
    assert exit_code_of(process) == code, commands.log.read_text()
    assert f"{number.name}: the run stops after this step" in commands.log.read_text()
    assert step <= Checkpoints(commands.run.checkpoints).newest().step <= step + 1
    commands.finish()
    attempts.add()


KILLS = {
    "writing its config": ("/.config", 1),
    "opening the metrics": ("metrics.jsonl", 1),
    "rewarding the first step": ("its reward", 1 + 16 + 5),
    "the first update": ("its update", 1),
    "publishing the first adapter": ("/adapters/.latest", 1),
    "saving the first checkpoint": ("/checkpoints/.", 1),
    "keeping a best adapter": ("/adapters/.best", 2),
    "saving the third checkpoint": ("/checkpoints/.", 3),
    "the last measurement": ("its reward", 1 + 16 + 5 * 16 + 5),
    "writing the report": ("/.report", 1),
}


@pytest.mark.proves("F1", "F2")
@pytest.mark.long
@pytest.mark.parametrize("deed", KILLS)
def test_a_kill_at_any_deed_of_a_command_changes_nothing(commands, attempts, deed):
    commands.new()
    process = commands.start(Instant(*KILLS[deed], signal.SIGKILL))
    assert exit_code_of(process) == -signal.SIGKILL, commands.log.read_text()
    commands.finish()
    attempts.add()


@pytest.mark.proves("F5")
@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), SIGNALS)
@pytest.mark.parametrize("deed", ["tiny/config.json", "its reward"])
def test_a_signal_before_the_first_step_ends_a_command_at_once(
    commands, attempts, deed, number, code
):
    commands.new()
    process = commands.start(Instant(deed, 1, number))
    assert exit_code_of(process) in (code, -number), commands.log.read_text()
    assert "Traceback" not in commands.log.read_text()
    commands.finish()
    attempts.add()


INTERRUPTED_WHILE_IT_IMPORTS = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
class Interrupts:
    def find_spec(self, name, *rest):
        if name == os.environ["LOADS"]:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupts())
from textpolicy.cli import main
sys.exit(main())
"""
LOADED_IN_TURN = ["textpolicy.cli.parser", "mlx.core", "textpolicy.cli.commands.doctor"]


@pytest.mark.proves("F5")
@pytest.mark.parametrize("name", LOADED_IN_TURN)
def test_an_interrupt_while_the_command_loads_shows_no_traceback(name, attempts):
    command = [sys.executable, "-c", INTERRUPTED_WHILE_IT_IMPORTS, "doctor"]
    environment = os.environ | {"LOADS": name}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (run.returncode, "Traceback" in run.stderr) == (130, False), run.stderr
    attempts.add()
