"""A bi-encoder without CLIP: sentence vectors of MiniLM, and EfficientNet's features projected onto them.

MiniLM knows nothing of images, so a linear map from features of images to vectors of their texts is fitted by ridge
regression, in closed form, on pairs of the user's. Its recall is that of the data it is fitted to.
"""

import functools
import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from tqdm import tqdm

from magma_jax.data.format.records import DataError
from magma_jax.models.vision.catalog import normalize_for
from magma_jax.models.vision.efficientnet_lite import EfficientNetLite, EfficientNetLiteConfig
from magma_jax.nn.modules import abstract, merge
from magma_jax.output import replace_file
from magma_jax.published.efficientnet_lite import read_weights
from magma_jax.published.text.minilm import MiniLM
from magma_jax.retrieval.sources import Documents
from magma_jax.retrieval.vectors import unit
from magma_jax.typing import Float, UInt8

# Pixels per side of the images.
SIZE = 64
# Layers early and late, whose means and standard deviations over an image are its features: early ones hold colours.
LAYERS = ("stem", 0, 2, 4, 7, 10, "head")
# Images of a compiled program.
BATCH = 32

_KIND = "minilm-efficientnet_lite0"
_NAMES = ("mean", "scale", "weight", "bias")


class BiEncoder:
    """The encoder; see ``encoders.Encoder``. Its name has the begin of a hash of the projection.

    Args:
        projection: file of ``fit_projection``.
        texts: encoder of texts; None for MiniLM of the installed package.

    Raises:
        DataError: no such file, or another one. FileNotFoundError: a package with weights is not installed.
    """

    image_size = SIZE

    def __init__(self, projection: str | Path, texts: Any = None):
        self._projection = _read(Path(projection).expanduser())
        self._sentences = MiniLM() if texts is None else texts
        self.width = self._sentences.width
        if self._projection["weight"].shape[1] != self.width:
            raise DataError(
                f"{projection}: projects to {self._projection['weight'].shape[1]} entries, but texts have {self.width}"
            )
        digest = hashlib.sha256(b"".join(self._projection[name].tobytes() for name in _NAMES))
        self.name = f"{_KIND}-{digest.hexdigest()[:8]}"

    def texts(self, texts: Sequence[str]) -> Float[np.ndarray, "N D"]:
        return self._sentences.texts(texts)

    def images(self, images: UInt8[np.ndarray, "N H W 3"]) -> Float[np.ndarray, "N D"]:
        p = self._projection
        return unit((image_features(images) - p["mean"]) * p["scale"] @ p["weight"] + p["bias"])


def fit_projection(
    documents: Documents,
    out: str | Path,
    *,
    splits: Sequence[str] = ("train",),
    ridge: float = 0.1,
    texts: Any = None,
) -> int:
    """Fits the projection to the pairs of some splits and writes it as safetensors; returns their number.

    Args:
        documents: pairs of texts and images.
        out: file to write.
        splits: splits to fit to.
        ridge: weight of the penalty, for features of norm 1 on average.
        texts: as for ``BiEncoder``.

    Raises:
        DataError: no such pairs. ValueError: a penalty of 0 or less.
    """
    if not 0 < ridge < float("inf"):
        raise ValueError(f"ridge must be above 0, got {ridge}")
    rows = [row for row, entry in enumerate(documents.entries) if entry.split in splits]
    if len(rows) < 2:
        raise DataError(f"{documents.name} has {len(rows)} documents of {', '.join(splits)}; two are the least")
    sentences = MiniLM() if texts is None else texts
    found, wanted = [], []
    for start in tqdm(range(0, len(rows), 8 * BATCH), desc="encoding documents", unit="part", disable=None):
        part = rows[start : start + 8 * BATCH]
        pixels = documents.pixels(part, SIZE)
        if pixels is None:
            raise DataError(f"{documents.name} has no images to fit to")
        found.append(image_features(pixels))
        wanted.append(sentences.texts([documents.entries[row].text for row in part]))
    features, targets = np.concatenate(found), np.concatenate(wanted)
    mean, bias = features.mean(0), targets.mean(0)
    scale = 1 / ((features.std(0) + 1e-3) * features.shape[1] ** 0.5)
    x = ((features - mean) * scale).astype(np.float64)
    # The smaller of the two equivalent systems: one unknown per pair, or one per feature.
    if len(x) <= x.shape[1]:
        weight = x.T @ np.linalg.solve(x @ x.T + ridge * np.eye(len(x)), targets - bias)
    else:
        weight = np.linalg.solve(x.T @ x + ridge * np.eye(x.shape[1]), x.T @ (targets - bias))
    arrays = dict(zip(_NAMES, (mean, scale, weight, bias), strict=True))
    about = {"kind": _KIND, "data": documents.name, "pairs": str(len(rows)), "ridge": str(ridge)}
    written = save({name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}, about)
    replace_file(Path(out).expanduser(), written)
    return len(rows)


def image_features(images: UInt8[np.ndarray, "N H W 3"]) -> Float[np.ndarray, "N C"]:
    """Means and standard deviations of EfficientNet-Lite0's layers over each image.

    Raises:
        FileNotFoundError: the package with the weights is not installed.
    """
    config, run = _efficientnet()
    parts = []
    for start in range(0, len(images), BATCH):
        rows = np.minimum(np.arange(start, start + BATCH), len(images) - 1)
        parts.append(np.asarray(run(normalize_for(config, images[rows]))))
    return np.concatenate(parts)[: len(images)]


@functools.cache
def _efficientnet() -> tuple[EfficientNetLiteConfig, Any]:
    config = EfficientNetLiteConfig(image_size=SIZE)
    graphdef, shapes, _ = abstract(lambda: EfficientNetLite(config, rngs=nnx.Rngs(0)))
    return config, functools.partial(_features, graphdef, read_weights(shapes))


@functools.partial(jax.jit, static_argnums=0)
def _features(graphdef: Any, params: Any, images: Any) -> Any:
    outputs = merge(graphdef, params).layers(images)
    statistics = itertools.product(LAYERS, (jnp.mean, jnp.std))
    return jnp.concatenate([statistic(outputs[layer], (1, 2)) for layer, statistic in statistics], axis=-1)


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, "numpy") as file:
            if (file.metadata() or {}).get("kind") == _KIND:
                return {name: file.get_tensor(name) for name in _NAMES}
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: cannot be read ({error}); write it with python -m magma_jax.retrieval fit") from None
    raise DataError(f"{path}: holds no projection; write one with python -m magma_jax.retrieval fit")
