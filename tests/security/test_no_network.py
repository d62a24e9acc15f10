"""No command opens a connection unless the user named a hub or a service."""

import json
import os
import socket
import sys
from io import StringIO

import pytest

from tests.faults.killable_runs import context, exit_code_of, start

TRAIN = [
    *("--env", "add", "--steps", "1", "--groups-per-step", "2", "--group-size", "2"),
    *("--count", "4", "--max-tokens", "2"),
]
COMMANDS = {
    "train": ["train", *TRAIN, "--output", "run"],
    "train, resumed": ["train", "--resume", "run", "--steps", "2", "--force"],
    "train, dry run": ["train", *TRAIN, "--dry-run"],
    "train, rewards in a process": [
        *("train", *TRAIN, "--reward", "reward.py", "--reward-timeout", "30", "--output", "mine"),
    ],
    "train, W&B without a key": ["train", *TRAIN, "--wandb", "p", "--output", "offline"],
    "sft": [
        *("sft", "--data", "rows.jsonl", "--iterations", "1", "--batch-size", "2"),
        *("--output", "taught"),
    ],
    "eval": ["eval", "--env", "add", "--count", "4", "--adapter", "run/adapters/best.safetensors"],
    "generate": ["generate", "--prompt", "1+2=", "--max-tokens", "2"],
    "chat": ["chat", "--max-tokens", "2"],
    "check": ["check", "reward.py", "--env", "add"],
    "inspect": ["inspect", "run/adapters/best.safetensors"],
    "export": ["export", "run", "--to", "mlx", "--output", "exported"],
    "push, dry run": ["push", "exported", "--repo", "me/mine", "--dry-run"],
    "plan": ["plan"],
    "runs": ["runs", "."],
    "report": ["report", "run"],
    "envs": ["envs"],
    "envs add": ["envs", "add"],
    "doctor": ["doctor"],
    "a model that is not there": ["generate", "--prompt", "1", "--model", "./nothing"],
    "a mistake": ["train", "--enw", "add"],
}
# The reward is a bad one, which the check says.
CODES = {"check": 1, "a model that is not there": 2, "a mistake": 2}
CONNECTS = {"socket.bind", "socket.connect", "socket.sendto", "socket.sendmsg"}
LOOKS_UP = {"socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"}


def is_local(address):
    """Return whether the address is a file, or of this machine: W&B asks its own process."""
    return not isinstance(address, tuple) or address[0] in {"127.0.0.1", "::1"}


def record(folder, name, connection):
    """Run a command in the folder, and send its exit code and what it did with sockets."""
    deeds = []

    def watch(event, facts):
        if event in CONNECTS and not is_local(facts[1]):
            deeds.append((event, str(facts[1])))
        if event in LOOKS_UP:
            deeds.append((event, str(facts)))

    os.chdir(folder)
    sys.stdin = StringIO("1+2=\n")
    sys.addaudithook(watch)
    from textpolicy.cli import main

    try:
        code = main(COMMANDS[name])
    except SystemExit as error:
        code = error.code
    connection.send((code, deeds))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder in which every command finds what it needs."""
    folder = tmp_path_factory.mktemp("offline")
    (folder / "reward.py").write_text("def reward(completion):\n    return len(completion) / 9\n")
    pairs = [{"prompt": f"{n}+{n}=", "completion": str(2 * n)} for n in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return folder


@pytest.fixture(autouse=True)
def no_account(monkeypatch, folder):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(folder))


@pytest.mark.proves("S15")
@pytest.mark.long
def test_no_command_opens_a_connection(folder, attempts):
    for name in COMMANDS:
        hear, say = context.Pipe(duplex=False)
        process = context.Process(target=record, args=(folder, name, say))
        process.start()
        assert hear.poll(300), name
        code, deeds = hear.recv()
        assert exit_code_of(process) == 0
        assert code == CODES.get(name, 0), name
        assert not deeds, name
        attempts.add()


def look_up(connection):
    deeds = []
    sys.addaudithook(lambda event, facts: deeds.append(event))
    with socket.socket() as one:
        one.settimeout(0.1)
        one.connect_ex(("127.0.0.1", 9))
        socket.getaddrinfo("localhost", 9)
    connection.send(deeds)


@pytest.mark.slow
def test_a_connection_would_be_recorded():
    hear, say = context.Pipe(duplex=False)
    assert exit_code_of(start(look_up, say)) == 0
    assert {"socket.connect", "socket.getaddrinfo"} <= set(hear.recv())
    assert is_local(("127.0.0.1", 9)) and is_local(b"/a/file") and not is_local(("10.0.0.1", 9))
