"""Runs `textpolicy serve` in this process, asks it from a thread, and ends it by Ctrl-C."""

import os
import signal
import socket
import time
import urllib.request
from collections.abc import Callable, Sequence
from threading import Event, Thread
from typing import Any
from urllib.error import URLError

from openai import OpenAI

from textpolicy.cli import main


def serve_while(
    argv: Sequence[str], ask: Callable[[OpenAI], Any], *, key: str = "-"
) -> tuple[int, Any]:
    """Return the exit code of the command, and what `ask` returned for a client of the server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results: list[Any] = []
    ended = Event()

    def play() -> None:
        try:
            _wait_for(f"http://127.0.0.1:{port}/health", ended)
            url = f"http://127.0.0.1:{port}/v1"
            with OpenAI(base_url=url, api_key=key, max_retries=0) as client:
                results.append(ask(client))
        except BaseException as error:
            results.append(error)
        finally:
            if not ended.is_set():
                os.kill(os.getpid(), signal.SIGINT)

    thread = Thread(target=play, daemon=True)
    thread.start()
    try:
        code = main([*argv, "--port", str(port)])
    finally:
        ended.set()
    thread.join()
    if results and isinstance(results[0], BaseException):
        raise results[0]
    return code, results[0]


def _wait_for(url: str, ended: Event) -> None:
    while not ended.wait(0.02):
        try:
            urllib.request.urlopen(url, timeout=10).close()
            return
        except URLError as error:
            assert isinstance(error.reason, ConnectionRefusedError), error
    raise AssertionError("the command ended before it listened")


def free_of(seconds: float, holds: Callable[[], bool]) -> bool:
    """Return whether something holds within some seconds."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
