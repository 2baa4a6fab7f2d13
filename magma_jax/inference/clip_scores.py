"""How well images fit texts, by a CLIP that the user has: to choose among drawings, and as a metric.

score = ClipScorer("ViT-B-32.pt")
images = model.generate_image("a red car", candidates=8, score=score)
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from magma_jax.data.images import to_uint8
from magma_jax.data.tokenizers.clip_text import clip_tokens
from magma_jax.inference.buckets import Buckets
from magma_jax.models.clip import CLIP, CLIPConfig
from magma_jax.models.vision.catalog import normalize_for
from magma_jax.nn.modules import abstract, merge
from magma_jax.published.text.open_clip import open_clip
from magma_jax.storage.hub import local_path
from magma_jax.typing import Float

# Pairs of a compiled program.
ROWS = Buckets((1, 8, 32))


class ClipScorer:
    """Cosines of the embeddings of images and texts by a CLIP in a file of OpenAI's or open_clip's.

    Attributes:
        config: sizes of the CLIP.
        name: its name in results: encoder and file.

    Raises:
        ConfigError, WeightFileError, TorchFileError, KeyMapError: see ``published.text.open_clip``.
    """

    def __init__(self, path: str | Path):
        path = local_path(path)
        with open_clip(path) as (config, tensors):
            self.config: CLIPConfig = config
            self._params = {name: jnp.asarray(tensor.read(), jnp.float32) for name, tensor in tensors.items()}
        image = config.image
        self.name = f"{image.kind} {image.image_size} px, {path.name}"
        definition = abstract(lambda: CLIP(config, rngs=nnx.Rngs(0)))[0]

        @jax.jit
        def cosines(params: Any, images: Any, tokens: Any) -> Any:
            model = merge(definition, params)
            return (model.embed_images(images) * model.embed_texts(tokens)).sum(-1)

        self._cosines = cosines

    def __call__(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Float[np.ndarray, " N"]:
        """Cosines of images with the text of each.

        An image is resized and cropped as CLIP's are. A text of too many tokens is cut.
        """
        if len(images) != len(texts):
            raise ValueError(f"{len(images)} images, but {len(texts)} texts: each image needs its text")
        size, length = self.config.image.image_size, self.config.text.positions
        found, count = [], ROWS.fit(min(len(images), ROWS.sizes[-1]))
        for start in range(0, len(images), count):
            # The last batch repeats its last pair, so that one program serves all.
            rows = np.minimum(np.arange(start, start + count), len(images) - 1)
            pixels = np.stack([to_uint8(images[row], size) for row in rows])
            tokens = clip_tokens([texts[int(row)] for row in rows], length)
            found.append(np.asarray(self._cosines(self._params, normalize_for(self.config.image, pixels), tokens)))
        return np.concatenate(found)[: len(images)] if found else np.zeros(0, np.float32)
