"""Refusals: answers to requests that the server cannot or may not meet, in OpenAI's form."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class RefusalError(Exception):
    """Why a request is refused: the HTTP status and the fields of OpenAI's error object."""

    message: str
    status: int = 400
    kind: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict[str, str])

    def body(self) -> dict[str, Any]:
        """Return the body of the answer."""
        names = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": names}


def unknown_model(name: str, known: list[str]) -> RefusalError:
    """Return the refusal of a model that is not served."""
    return RefusalError(
        f"the model {name!r:.100} is not served here. The models are {known}; GET /v1/models "
        "lists them",
        status=404,
        kind="not_found_error",
        param="model",
        code="model_not_found",
    )


def server_failure(what: str) -> RefusalError:
    """Return the answer to a request that failed inside the server."""
    return RefusalError(what, status=500, kind="server_error", code="internal_error")


def stopping_server() -> RefusalError:
    """Return the answer to requests that are open when the server stops."""
    return RefusalError(
        "the server is stopping. Ask again when it has been started again",
        status=503,
        kind="server_error",
        code="server_stopping",
        headers={"Retry-After": "5"},
    )
