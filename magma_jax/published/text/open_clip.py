"""Published CLIP models, both encoders: OpenAI's files (TorchScript archives or state dicts) and open_clip's."""

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from flax import nnx

from magma_jax.config import ConfigError
from magma_jax.foreign import read_json, shown
from magma_jax.models.clip import CLIP, CLIPConfig, CLIPTextConfig
from magma_jax.nn.modules import abstract
from magma_jax.published.encoder_sources import OPEN_CLIP_CONFIG
from magma_jax.published.infer_config import InferenceError, Known, encoder_config, layer_count, tensor_shape
from magma_jax.published.keymap.engine import Ignored, KeyMapError, Rule, to_ours
from magma_jax.published.magma_keys import Entry, encoder_table
from magma_jax.storage.deferred import Deferred
from magma_jax.storage.files import open_tensors

# Width of a head of the text encoder and of a vision transformer in all published models.
HEAD_WIDTH = 64


@contextlib.contextmanager
def open_clip(path: str | Path) -> Iterator[tuple[CLIPConfig, dict[str, Deferred]]]:
    """Opens a CLIP: its config, from shapes, and a lazy tensor for every parameter.

    Whether a model has ``quick_gelu`` does not follow from its tensors: open_clip's settings file beside it says so,
    and without one it is OpenAI's, which all have it.

    Raises:
        ConfigError: the file holds no CLIP. WeightFileError, TorchFileError: it cannot be read. KeyMapError: its
            tensors do not match.
    """
    path = Path(path)
    with open_tensors(path) as weights:
        tensors = weights.tensors
        # open_clip's training checkpoints of a model wrapped for data parallelism.
        if all(key.startswith("module.") for key in tensors):
            tensors = {key.removeprefix("module."): tensor for key, tensor in tensors.items()}
        settings = weights.files[0].parent / OPEN_CLIP_CONFIG
        try:
            config = _infer(tensors, "quick_gelu" if _quick(settings) else "gelu")
        except (InferenceError, ValueError, TypeError, KeyError, IndexError, ArithmeticError) as error:
            names = ", ".join(map(shown, list(tensors)[:3]))
            raise ConfigError(f"{path}: no CLIP that is known here, its tensors are {names} ... ({error})") from None
        shapes = abstract(lambda: CLIP(config, rngs=nnx.Rngs(0)))[1]
        try:
            yield config, to_ours(clip_table(config), tensors, shapes)
        except KeyMapError as error:
            raise KeyMapError(f"{path}: {error}") from None


def clip_table(config: CLIPConfig) -> list[Entry]:
    """Key table of a CLIP."""
    block, stack = "transformer.resblocks.{layer}.", "text/blocks/"
    layers = [(f"attn.in_proj_{name}", f"attn/in_proj/{name}") for name in ("weight", "bias")]
    pairs = ("attn.out_proj", "attn/out_proj"), ("mlp.c_fc", "c_fc"), ("mlp.c_proj", "c_proj"), ("ln_1", "ln_1")
    for theirs, ours in (*pairs, ("ln_2", "ln_2")):
        layers += [(f"{theirs}.{name}", f"{ours}/{name}") for name in ("weight", "bias")]
    return [
        *encoder_table(config.image, "visual.", "image/"),
        Rule("token_embedding.weight", "text/token_embedding/weight"),
        Rule("positional_embedding", "text/positional_embedding"),
        Rule("text_projection", "text/proj"),
        *(Rule(f"ln_final.{name}", f"text/ln_final/{name}") for name in ("weight", "bias")),
        *(Rule(block + theirs, stack + ours, stack="layer") for theirs, ours in layers),
        # Beside the scale of the logits: what OpenAI's archives say of the sizes, and a mask.
        *(Ignored(name) for name in ("logit_scale", "input_resolution", "context_length", "vocab_size", "attn_mask")),
    ]


def _infer(tensors: Mapping[str, Any], activation: Literal["quick_gelu", "gelu"]) -> CLIPConfig:
    positions, width = tensor_shape(tensors, "positional_embedding", 2)
    embedding = tensor_shape(tensors, "text_projection", 2)[1]
    visual: dict[str, Any] = {"activation": activation}
    if "visual.attnpool.positional_embedding" in tensors:
        rows = tensor_shape(tensors, "visual.attnpool.positional_embedding", 2)[0] - 1
        visual["res"] = 32 * math.isqrt(rows)
    elif "visual.conv1.weight" in tensors:
        visual["heads"] = max(tensor_shape(tensors, "visual.conv1.weight", 4)[0] // HEAD_WIDTH, 1)
    image: Any = encoder_config(tensors, Known({"encoder": visual}), root="visual.", features=embedding)
    pooled = {"attention_pool": True} if image.kind == "clip_resnet" else {"output": "pooled"}
    text = CLIPTextConfig(
        layers=layer_count(tensors, re.escape("transformer.resblocks.") + r"(\d+)\.ln_1\.weight"),
        width=width,
        heads=max(width // HEAD_WIDTH, 1),
        rows=tensor_shape(tensors, "token_embedding.weight", 2)[0],
        positions=positions,
        activation=activation,
    )
    return CLIPConfig(dataclasses.replace(image, embedding_width=embedding, **pooled), text)


def _quick(settings: Path) -> bool:
    if not settings.is_file():
        return True
    try:
        return bool(read_json(settings)["model_cfg"].get("quick_gelu", False))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{settings}: not the settings of an open_clip model ({error}); fetch it again") from None
