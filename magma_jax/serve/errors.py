"""Error responses of the server."""

from collections.abc import Mapping
from typing import Any

from fastapi.responses import JSONResponse

# Error code of an overloaded server.
QUEUE_FULL = "queue_full"


class RequestError(ValueError):
    """Request that cannot be served: HTTP status, one-line message, and the field at fault."""

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


def busy(what: str) -> RequestError:
    """Error of an overloaded server; the client may try again later."""
    return RequestError(f"{what}; try again later", 429, code=QUEUE_FULL)


def error_body(error: RequestError) -> dict[str, Any]:
    """Error as OpenAI's JSON object."""
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


def error_response(error: RequestError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Error as an HTTP response."""
    retry = {"Retry-After": "1"} if error.status in (429, 503) else {}
    return JSONResponse(error_body(error), error.status, headers=retry | dict(headers or {}))
