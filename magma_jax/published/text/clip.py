"""CLIP with both towers, from OpenAI's or open_clip's weight files: texts and images as vectors of one space."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from magma_jax.config import ConfigError
from magma_jax.data.images import to_uint8
from magma_jax.data.tokenizers.clip_text import clip_text_ids
from magma_jax.foreign import ForeignError, read_json
from magma_jax.models.text.clip_text import CLIPText, CLIPTextConfig
from magma_jax.models.vision.catalog import EncoderConfig, build_encoder, normalize_for
from magma_jax.models.vision.clip_resnet import CLIPResNetConfig
from magma_jax.models.vision.clip_vit import CLIPViTConfig
from magma_jax.nn.modules import abstract, merge
from magma_jax.published.encoder_sources import OPEN_CLIP_CONFIG
from magma_jax.published.infer_config import InferenceError, Known, encoder_config, layer_count, tensor_shape
from magma_jax.published.keymap.engine import Ignored, KeyMapError, Rule, to_ours
from magma_jax.published.magma_keys import encoder_table
from magma_jax.storage.files import open_tensors
from magma_jax.typing import Float, Params, UInt8

Activation = Literal["quick_gelu", "gelu"]

# Texts or images of a compiled program.
BATCH = 32
# Width of a head where no settings say otherwise, in both towers.
HEAD = 64
# Tensors of a CLIP file that no vector depends on.
_BESIDE = ("logit_scale", "logit_bias", "attn_mask", "input_resolution", "context_length", "vocab_size")


@dataclasses.dataclass(frozen=True)
class CLIP:
    """A CLIP model; vectors are fp32 of norm 1, and their inner product is the similarity of text and image.

    Attributes:
        name: kind of its image tower, its activation and the begin of a hash of its projections.
        width: entries of a vector.
        image_size: pixels per side of its images.
    """

    name: str
    width: int
    image_size: int
    _length: int
    _texts: Callable[[Any, Any], Any]
    _images: Callable[[Any], Any]

    def texts(self, texts: Sequence[str]) -> Float[np.ndarray, "N D"]:
        """Vectors of texts; each is cut to the tokens that the model knows."""
        ids, ends = clip_text_ids(texts, self._length)
        return self._batched(self._texts, len(texts), ids, ends)

    def images(self, images: UInt8[np.ndarray, "N H W 3"]) -> Float[np.ndarray, "N D"]:
        """Vectors of images of ``image_size`` pixels per side."""
        return self._batched(self._images, len(images), images)

    def scores(self, images: Sequence[Image.Image], text: str) -> Float[np.ndarray, " N"]:
        """Cosines of images and a text."""
        pixels = np.stack([to_uint8(image, self.image_size) for image in images])
        return self.images(pixels) @ self.texts([text])[0]

    def _batched(self, run: Callable[..., Any], count: int, *arrays: np.ndarray) -> Float[np.ndarray, "N D"]:
        parts = [np.zeros((0, self.width), np.float32)]
        for start in range(0, count, BATCH):
            # The last batch is padded with its last row, so that one program serves all.
            rows = np.minimum(np.arange(start, start + BATCH), count - 1)
            parts.append(np.asarray(run(*(array[rows] for array in arrays))))
        return np.concatenate(parts)[:count]


def read_clip(path: str | Path, activation: Activation | None = None) -> CLIP:
    """Opens a weight file of OpenAI's CLIP (TorchScript archive or state dict) or of open_clip.

    Args:
        path: the file, or a folder with it.
        activation: of both towers, which weights do not tell. None: that of ``open_clip_config.json`` beside the file,
            else OpenAI's ``quick_gelu``; most models that open_clip trained use ``gelu``.

    Raises:
        ConfigError: no CLIP with a text tower that is known here. WeightFileError, TorchFileError: the file cannot be
            read. KeyMapError: tensors that do not fit each other.
    """
    path = Path(path).expanduser()
    with open_tensors(path) as weights:
        tensors = weights.tensors
        if all(key.startswith("module.") for key in tensors):
            tensors = {key.removeprefix("module."): tensor for key, tensor in tensors.items()}
        settings = _settings(weights.files[0].parent / OPEN_CLIP_CONFIG)
        used: Activation = activation or ("gelu" if settings and not settings.get("quick_gelu") else "quick_gelu")
        try:
            text, image = _text_config(tensors, used, settings), _image_config(tensors, used, settings)
        except (InferenceError, ValueError, TypeError, IndexError, ArithmeticError) as error:
            raise ConfigError(f"{path}: no CLIP with a text tower that is known here ({error})") from None
        if text.embedding_width != image.embedding_width:
            raise ConfigError(
                f"{path}: its texts have {text.embedding_width} entries, but its images {image.embedding_width}"
            )
        parts = {key for key in tensors if not key.startswith("visual.")}
        try:
            text_params = _read(_text_table(), {key: tensors[key] for key in parts}, lambda: _text(text))
            found = {key.removeprefix("visual."): tensors[key] for key in tensors.keys() - parts}
            image_params = _read(encoder_table(image), found, lambda: build_encoder(image, rngs=nnx.Rngs(0)))
        except KeyMapError as error:
            raise KeyMapError(f"{path}: {error}") from None
    digest = hashlib.sha256(b"".join(np.asarray(text_params[name]).tobytes() for name in ("proj", "ln_f/weight")))
    return CLIP(
        f"{image.kind}-{used}-{digest.hexdigest()[:8]}",
        text.embedding_width,
        image.image_size,
        text.length,
        functools.partial(_run_text, abstract(lambda: _text(text))[0], text_params),
        functools.partial(
            _run_images, abstract(lambda: build_encoder(image, rngs=nnx.Rngs(0)))[0], image_params, image
        ),
    )


def _text(config: CLIPTextConfig) -> CLIPText:
    return CLIPText(config, rngs=nnx.Rngs(0))


@functools.partial(jax.jit, static_argnums=0)
def _run_text(graphdef: Any, params: Params, ids: Any, ends: Any) -> Any:
    return _unit(merge(graphdef, params).encode(ids, ends))


@functools.partial(jax.jit, static_argnums=(0, 2))
def _run_images(graphdef: Any, params: Params, config: EncoderConfig, images: Any) -> Any:
    model, normal = merge(graphdef, params), normalize_for(config, images)
    found = model(normal)
    return _unit(model.pool(found) if isinstance(config, CLIPResNetConfig) else found)


def _unit(vectors: Any) -> Any:
    vectors = vectors.astype(jnp.float32)
    return vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)


def _settings(file: Path) -> Mapping[str, Any]:
    """What open_clip says of a model: its ``model_cfg``, or nothing."""
    if not file.is_file():
        return {}
    try:
        found = read_json(file)["model_cfg"]
        return {"quick_gelu": False, **found}
    except (ForeignError, KeyError, TypeError) as error:
        raise ConfigError(f"{file}: not the settings of an open_clip model ({error}); fetch it again") from None


def _text_config(tensors: Mapping[str, Any], activation: Activation, settings: Mapping[str, Any]) -> CLIPTextConfig:
    rows, width = tensor_shape(tensors, "token_embedding.weight")
    return CLIPTextConfig(
        layers=layer_count(tensors, r"transformer\.resblocks\.(\d+)\.ln_1\.weight"),
        width=width,
        heads=int((settings.get("text_cfg") or {}).get("heads") or width // HEAD or 1),
        vocab_rows=rows,
        length=tensor_shape(tensors, "positional_embedding")[0],
        embedding_width=tensor_shape(tensors, "text_projection")[1],
        activation=activation,
    )


def _image_config(
    tensors: Mapping[str, Any], activation: Activation, settings: Mapping[str, Any]
) -> CLIPViTConfig | CLIPResNetConfig:
    """The image tower with its embedding; a ResNet's image size follows from its attention pool."""
    vision = settings.get("vision_cfg") or {}
    known: dict[str, Any] = {"activation": activation}
    if "visual.class_embedding" in tensors:
        width = tensor_shape(tensors, "visual.conv1.weight", 4)[0]
        known["heads"] = width // int(vision.get("head_width") or HEAD) or 1
        config = encoder_config(tensors, Known({"encoder": known}), "visual.")
        width = tensor_shape(tensors, "visual.proj")[1]
        return dataclasses.replace(config, output="pooled", embedding_width=width)
    if "visual.attnpool.positional_embedding" in tensors:
        positions = tensor_shape(tensors, "visual.attnpool.positional_embedding")[0] - 1
        known["res"] = 32 * int(positions**0.5)
        config = encoder_config(tensors, Known({"encoder": known}), "visual.")
        width = tensor_shape(tensors, "visual.attnpool.c_proj.weight")[0]
        return dataclasses.replace(config, attention_pool=True, embedding_width=width)
    raise InferenceError("visual.* is neither a CLIP vision transformer nor a CLIP ResNet with its attention pool")


def _text_table() -> list[Any]:
    block, ours = "transformer.resblocks.{layer}.", "layers/"
    names = {
        "ln_1": "ln_1",
        "ln_2": "ln_2",
        "attn.out_proj": "attn/out_proj",
        "mlp.c_fc": "mlp/c_fc",
        "mlp.c_proj": "mlp/c_proj",
    }
    return [
        Rule("token_embedding.weight", "wte/weight"),
        Rule("positional_embedding", "wpe/weight"),
        Rule("text_projection", "proj"),
        *(Rule(f"ln_final.{part}", f"ln_f/{part}") for part in ("weight", "bias")),
        *(
            Rule(f"{block}{theirs}.{part}", f"{ours}{name}/{part}", stack="layer")
            for theirs, name in names.items()
            for part in ("weight", "bias")
        ),
        *(
            Rule(f"{block}attn.in_proj_{part}", f"{ours}attn/qkv_proj/{part}", stack="layer")
            for part in ("weight", "bias")
        ),
        *map(Ignored, _BESIDE),
    ]


def _read(table: list[Any], tensors: Mapping[str, Any], create: Callable[[], nnx.Module]) -> Params:
    """Parameters in fp32; OpenAI's archives hold fp16."""
    shapes = abstract(create)[1]
    return {path: jnp.asarray(tensor.read()) for path, tensor in to_ours(table, tensors, shapes).items()}
