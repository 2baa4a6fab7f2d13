"""Server config."""

import dataclasses

from magma_jax.serve.prompts.images import ImageRules
from magma_jax.serve.prompts.templates import Templates


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """Config of a server.

    Attributes:
        model: name of the model in the API.
        api_key: key required on every route but ``/health``, as a bearer token or as the password of basic
            authentication; None for no key.
        open_metrics: whether ``/metrics`` needs no key.
        root_path: prefix of all routes behind a proxy.
        templates: chat templates.
        cut_max_tokens: reduce ``max_tokens`` to the rest of the context instead of refusing the request.
        max_body_bytes: limit on a request body.
        max_text_bytes: limit on a request body without its images.
        timeout: seconds for a request, waiting included.
        head_timeout: seconds for a new connection to send the request line and headers.
        body_timeout: seconds for a request body to arrive.
        send_timeout: seconds for a client to read pending data.
        grace: seconds for running requests at shutdown.
        connections: maximum number of connections.
        max_held_bytes: limit on all request bodies together, from their arrival until their images are decoded.
        decoders: number of images decoded concurrently.
        hosts: allowed names in the Host header, besides addresses, ``localhost`` and the machine's name; "*" for any.
        origins: web origins, such as ``https://lab.example``, whose pages may use the server; "*" for any.
        images: rules for images.
    """

    model: str = "magma"
    api_key: str | None = None
    max_body_bytes: int = 32 * 2**20
    max_text_bytes: int = 4 * 2**20
    timeout: float = 120.0
    head_timeout: float = 10.0
    body_timeout: float = 20.0
    send_timeout: float = 30.0
    grace: float = 25.0
    connections: int = 1_000
    max_held_bytes: int = 256 * 2**20
    decoders: int = 2
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    images: ImageRules = ImageRules()
    open_metrics: bool = False
    root_path: str = ""
    templates: Templates = Templates()
    cut_max_tokens: bool = False
