"""Who may ask: the bearer key, the name of the host, and the length of the body."""

import asyncio
import hmac
import ipaddress
import json
import socket
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from contextlib import suppress
from typing import Any

from textpolicy.serving.refusal import RefusalError

OwnerOf = Callable[[str], Any]
"""Takes a bearer key; returns its owner, or None if the key may not ask."""
MAX_BODY_BYTES = 4 << 20
"""Bytes of a request's body."""
MAX_DISCARDED_BYTES = 64 << 20
"""Bytes of a body that are read and dropped, before the connection is given up."""
_DISCARD_SECONDS = 10.0
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "::1")
# A monitor asks for these without a key; the answers say nothing of prompts or models.
_OPEN_PATHS = ("/health", "/ping")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]


def one_key(token: str) -> OwnerOf:
    """Return a check that allows one key only, whose owner is "token"."""
    expected = token.encode()

    def owner_of(key: str) -> str | None:
        # Comparing texts would tell by its time how much of a key is right.
        return "token" if hmac.compare_digest(key.encode(), expected) else None

    return owner_of


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a server that listens on `host`."""
    if host.lower() in _LOOPBACK:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def hosts_for(host: str, more: Collection[str] = ()) -> frozenset[str]:
    """Return the names by which clients may ask a server that listens on `host`.

    A page in a browser can let its own name lead to this machine, and then asks under that name.
    """
    names = {*_LOOPBACK, host, *more}
    if not is_loopback(host):
        names |= {socket.gethostname(), socket.getfqdn()}
    return frozenset(name.lower() for name in names)


class Guard:
    """Refuses requests that may not be answered, before anything else reads them.

    `hosts` None allows every name. `owner_of` None asks for no key. The owner of the key is in
    `scope["state"]["owner"]`.
    """

    def __init__(
        self, app: Asgi, *, hosts: Collection[str] | None, owner_of: OwnerOf | None
    ) -> None:
        self._app = app
        self._hosts = hosts
        self._owner_of = owner_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope)
        except RefusalError as refusal:
            await discard_body(receive)
            await send_refusal(refusal, send)
            return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers = {name.decode("latin-1"): value for name, value in scope["headers"]}
        host = headers.get("host", b"").decode("latin-1").lower()
        if self._hosts is not None and _without_port(host) not in self._hosts:
            raise RefusalError(
                f"the Host {host!r:.80} is not a name of this server. If it should be one, start "
                "the server with --allow-host NAME",
                status=403,
                kind="permission_error",
                code="wrong_host",
            )
        owner: Any = None
        if self._owner_of is not None and scope["path"] not in _OPEN_PATHS:
            owner = self._owner(headers.get("authorization", b"").decode("latin-1"))
        scope.setdefault("state", {})["owner"] = owner
        length = headers.get("content-length", b"0")
        if length.isdigit() and int(length[:20]) > MAX_BODY_BYTES:
            raise too_long_body()

    def _owner(self, authorization: str) -> Any:
        assert self._owner_of is not None
        scheme, _, key = authorization.partition(" ")
        owner = self._owner_of(key.strip()) if scheme.lower() == "bearer" else None
        if owner is None:
            raise RefusalError(
                "the request has no key that this server accepts. Send the token that the server "
                "printed at its start as 'Authorization: Bearer TOKEN'",
                status=401,
                kind="authentication_error",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return owner


def too_long_body() -> RefusalError:
    """Return the refusal of a body that is too long."""
    return RefusalError(
        f"the body has more than {MAX_BODY_BYTES} bytes. Send fewer prompts, or shorter ones",
        status=413,
        code="body_too_long",
    )


async def discard_body(receive: Receive) -> None:
    """Read the body to its end, because many clients read no answer before they have sent all."""
    read = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(_DISCARD_SECONDS):
            while read <= MAX_DISCARDED_BYTES:
                message = await receive()
                if message["type"] != "http.request" or not message.get("more_body"):
                    return
                read += len(message.get("body", b""))


async def send_refusal(refusal: RefusalError, send: Send) -> None:
    """Send a refusal as the answer."""
    body = json.dumps(refusal.body()).encode()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        **refusal.headers,
    }
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]
