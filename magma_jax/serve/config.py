"""How a server behaves."""

import dataclasses

from magma_jax.serve.pictures import PictureRules


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """How a server behaves.

    Attributes:
        model: the name that requests call the model by.
        api_key: asked for on every route, as a bearer token or as the password of basic authentication; None for none.
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
