"""`running_server`: uvicorn in a thread of its own, which never touches mlx."""

import socket
from collections.abc import Generator
from contextlib import contextmanager
from threading import Thread

import uvicorn

from textpolicy.errors import ConfigError
from textpolicy.serving.app import App

_MAX_CONNECTIONS = 2000
_SECONDS_TO_END = 5


@contextmanager
def running_server(app: App, host: str = "127.0.0.1", port: int = 0) -> Generator[str]:
    """Answer requests inside the block; the value is the address, such as "http://127.0.0.1:8000".

    Port 0 is any free port. Requests are sampled only while this thread runs `app.served.run()`.
    At the end of the block, open requests are told that the server stops.
    """
    listener = _listen(host, port)
    config = uvicorn.Config(
        app,
        lifespan="off",
        log_level="error",
        access_log=False,
        server_header=False,
        limit_concurrency=_MAX_CONNECTIONS,
        timeout_graceful_shutdown=_SECONDS_TO_END,
        # One protocol for all installations, whatever else is installed.
        http="h11",
        loop="asyncio",
        ws="none",
    )
    server = uvicorn.Server(config)
    thread = Thread(target=server.run, args=([listener],), name="textpolicy-server", daemon=True)
    thread.start()
    shown = f"[{host}]" if ":" in host else host
    try:
        yield f"http://{shown}:{listener.getsockname()[1]}"
    finally:
        app.served.close()
        server.should_exit = True
        thread.join()
        listener.close()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        raise ConfigError(
            f"nothing can listen on {host} port {port}: {error.strerror or error}. Choose another "
            "--port, or 0 for any free one"
        ) from error
    return listener
