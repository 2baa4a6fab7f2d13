"""What a client is told when its request cannot be served."""

from collections.abc import Mapping
from typing import Any

from fastapi.responses import JSONResponse

# Code of the errors that mean: try again later.
QUEUE_FULL = "queue_full"


class RequestError(ValueError):
    """A request that cannot be served: HTTP status, one line, and the field it is about."""

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


def busy(what: str) -> RequestError:
    """The error that means: the server has too much to do, try again later."""
    return RequestError(f"{what}; try again later", 429, code=QUEUE_FULL)


def error_body(error: RequestError) -> dict[str, Any]:
    """The standard's JSON of an error."""
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


def error_response(error: RequestError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """An error as the answer to a request."""
    retry = {"Retry-After": "1"} if error.status in (429, 503) else {}
    return JSONResponse(error_body(error), error.status, headers=retry | dict(headers or {}))
