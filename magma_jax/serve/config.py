"""How a server behaves."""

import dataclasses

from magma_jax.serve.prompts.images import ImageRules
from magma_jax.serve.prompts.templates import Templates


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """How a server behaves.

    Attributes:
        model: the name that requests call the model by.
        api_key: asked for on every route but ``/health``, as a bearer token or as the password of basic
            authentication; None for none.
        open_metrics: whether ``/metrics`` answers without the key.
        root_path: prefix of all routes, where a proxy puts the server below one.
        templates: the wordings that messages are put into.
        cut_max_tokens: answers get what the context has left where more is asked for, in place of an error.
        max_body_bytes: of a request.
        max_text_bytes: of a request beside its images.
        timeout: seconds that a request may take, waiting included.
        head_timeout: seconds until a connection's request must begin to arrive, line and headers.
        body_timeout: seconds that a request may take to arrive.
        send_timeout: seconds in which a client must read what waits for it.
        grace: seconds that running requests are given when the server is told to stop.
        connections: at a time.
        max_held_bytes: of the bodies of requests together, from their arrival until their images are decoded.
        decoders: images that are decoded at the same time.
        hosts: names that the server goes by, beside addresses, ``localhost`` and the machine's own name; "*" for any.
        origins: web origins, such as ``https://lab.example``, whose pages may use the server; "*" for any.
        images: what images are taken.
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
