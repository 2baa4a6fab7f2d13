"""How a server behaves."""

import dataclasses

from magma_jax.serve.pictures import PictureRules
from magma_jax.serve.templates import Templates


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """How a server behaves.

    Attributes:
        model: the name that requests call the model by.
        api_key: asked for on every route but ``/health``, as a bearer token or as the password of basic
            authentication; None for none.
        open_metrics: whether ``/metrics`` answers without the key.
        origins: web origins, such as ``https://lab.example``, whose pages may use the server; ``*`` for any.
        root_path: prefix of all routes, where a proxy puts the server below one.
        templates: the wordings that messages are put into.
        cut_max_tokens: answers get what the context has left where more is asked for, in place of an error.
        max_body_bytes: of a request.
        timeout: seconds that a request may take, waiting included.
        body_timeout: seconds that it may take to arrive.
        max_held_bytes: of the bodies of requests together, from their arrival until their pictures are decoded.
        decoders: pictures that are decoded at the same time.
        pictures: what pictures are taken.
    """

    model: str = "magma"
    api_key: str | None = None
    max_body_bytes: int = 32 * 2**20
    timeout: float = 120.0
    body_timeout: float = 20.0
    max_held_bytes: int = 256 * 2**20
    decoders: int = 2
    pictures: PictureRules = PictureRules()
    open_metrics: bool = False
    origins: tuple[str, ...] = ()
    root_path: str = ""
    templates: Templates = Templates()
    cut_max_tokens: bool = False
