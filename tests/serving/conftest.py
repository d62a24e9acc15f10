"""A server of the embedded model with two adapters, which tests ask from threads."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import pytest
from openai import OpenAI

from tests.served_adapters import write_adapters

_T = TypeVar("_T")
TOKEN = "a-token-of-the-tests"


class LiveServer:
    """A server in this process. The engine runs in this thread while other threads ask it."""

    def __init__(self, address: str, served: Any, exchanges: list[Any]) -> None:
        self.address = address
        self.served = served
        self.exchanges = exchanges
        self._clients = ExitStack()

    def client(self, key: str = TOKEN, **options: Any) -> OpenAI:
        """Return a client, which is closed when the server is."""
        client = OpenAI(base_url=f"{self.address}/v1", api_key=key, max_retries=0, **options)
        return self._clients.enter_context(client)

    def close(self) -> None:
        self._clients.close()

    def run(self, *functions: Callable[[], _T]) -> list[_T]:
        """Return what the functions return, each in a thread of its own, while the engine runs."""
        futures: list[Future[_T]] = [Future() for _ in functions]
        for function, future in zip(functions, futures, strict=True):
            future.add_done_callback(lambda _: self.served.wake())
            Thread(target=_fill, args=(future, function), daemon=True).start()
        self.served.run(until=lambda: all(future.done() for future in futures))
        return [future.result() for future in futures]

    def ask(self, function: Callable[[OpenAI], _T]) -> _T:
        """Return what a function returns for a client of this server."""
        (result,) = self.run(lambda: function(self.client()))
        return result

    def wait_until(self, holds: Callable[[], bool]) -> None:
        """Run the engine until something holds."""
        self.served.run(until=holds)


def _fill(future: "Future[Any]", function: Callable[[], Any]) -> None:
    try:
        future.set_result(function())
    except BaseException as error:
        future.set_exception(error)


@pytest.fixture(scope="session")
def adapter_files(load_tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_adapters(tmp_path_factory.mktemp("served"), load_tiny)


@contextmanager
def serving(served: Any, **options: Any) -> Iterator[LiveServer]:
    """Serve an engine inside the block; the server keeps all exchanges."""
    from textpolicy.serving.app import create_app
    from textpolicy.serving.server import running_server

    exchanges: list[Any] = []
    app = create_app(served, on_exchange=exchanges.append, **options)
    with running_server(app) as address, closing(LiveServer(address, served, exchanges)) as live:
        yield live


@pytest.fixture(scope="package")
def live(load_tiny: Any, adapter_files: dict[str, Path]) -> Iterator[LiveServer]:
    from textpolicy.serving.adapters import ServedAdapters
    from textpolicy.serving.engine_queue import ServedEngine
    from textpolicy.serving.security import hosts_for, one_key

    served = ServedEngine(*load_tiny())
    adapters = ServedAdapters(served, "tiny", allowed=[adapter_files["red"].parent])
    for name, path in adapter_files.items():
        adapters.put(name, path)
    hosts = hosts_for("127.0.0.1")
    with serving(served, owner_of=one_key(TOKEN), hosts=hosts, adapters=adapters) as server:
        yield server


@pytest.fixture
def policy_of(load_tiny: Any, adapter_files: dict[str, Path]) -> Callable[..., Any]:
    """Return a function that makes the policy of a served model, to compare answers with."""
    from textpolicy.adapters import AdapterContainer
    from textpolicy.generation.policy import ModelPolicy
    from textpolicy.types import Sampling

    def make(name: str = "tiny", **sampling: Any) -> Any:
        model, tokenizer = load_tiny()
        if name != "tiny":
            AdapterContainer.from_directory(adapter_files[name]).load(model)
        return ModelPolicy(model, tokenizer, Sampling(**sampling))

    return make
