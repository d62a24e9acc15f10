"""Run commands as a user does, for their answer or for their message."""

import json

import pytest

from textpolicy.cli import main


@pytest.fixture
def answer(capsys):
    """Return a function that runs a command with --json and returns its answer."""

    def run(*argv: str) -> dict:
        capsys.readouterr()
        code = main([*argv, "--json"])
        stdout, stderr = capsys.readouterr()
        assert code == 0, stderr
        if argv[0] == "chat":
            *_, stdout = stdout.splitlines()  # after the answers
        return json.loads(stdout)  # one object, and nothing else on stdout

    return run


@pytest.fixture
def failure(capsys):
    """Return a function that runs a command that must fail, and returns its one message.

    Without `code`, the exit code may be 1 or 2; tests/cli/test_exit_codes.py tells them apart.
    """

    def run(*argv: str, code: int | None = None) -> str:
        capsys.readouterr()
        assert main(argv) in ((1, 2) if code is None else (code,))
        stdout, stderr = capsys.readouterr()
        assert stdout == ""
        assert "Traceback" not in stderr
        return stderr

    return run
