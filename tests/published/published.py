"""Tiny models in the files of those who publish large ones."""

import dataclasses
import json

import numpy as np
from flax import nnx

from magma_jax.models.language.decoder import Decoder
from magma_jax.models.language.gptj import GPTJConfig
from magma_jax.models.vision.catalog import EncoderConfig, build_encoder
from magma_jax.models.vision.clip_resnet import CLIPResNetConfig
from magma_jax.nn.modules import abstract
from magma_jax.published.keymap.engine import to_theirs
from magma_jax.published.language_model_keys import language_model_table
from magma_jax.published.magma_keys import encoder_table
from magma_jax.storage.safetensors_file import write_safetensors

GPTJ = GPTJConfig(
    layers=3, width=16, heads=2, rotary_dim=4, feed_forward=32, vocab_rows=310, head_rows=310, context_length=64
)
RESNET = CLIPResNetConfig(blocks=(1, 2, 1, 1), width=8, image_size=64)


def noise(shapes: dict) -> dict:
    """Arrays of these shapes and dtypes; all differ, so that none can hide in the place of another."""
    random = np.random.default_rng(0)
    return {path: (50 * random.normal(size=shape.shape)).astype(shape.dtype) for path, shape in shapes.items()}


def hf_config(config: GPTJConfig) -> dict:
    return {
        "model_type": "gptj",
        "n_layer": config.layers,
        "n_embd": config.width,
        "n_head": config.heads,
        "rotary_dim": config.rotary_dim,
        "n_inner": config.feed_forward,
        "vocab_size": config.vocab_rows,
        "n_positions": config.context_length,
        "layer_norm_epsilon": config.layernorm_eps,
        "activation_function": "gelu_new",
        "tie_word_embeddings": False,
    }


def gptj_folder(folder, config: GPTJConfig = GPTJ, shards: int = 2):
    """A folder as of Hugging Face in fp16, with the masks of older files; returns the parameters by our paths."""
    config = dataclasses.replace(config, dtype="float16")
    params = noise(abstract(lambda: Decoder(config, rngs=nnx.Rngs(0)))[1])
    tensors: dict = dict(to_theirs(language_model_table(config), params))
    for i in range(config.layers):
        tensors[f"transformer.h.{i}.attn.bias"] = np.tril(np.ones((1, 1, 64, 64), bool))
        tensors[f"transformer.h.{i}.attn.masked_bias"] = np.array(-1e9, np.float32)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(hf_config(config)))
    weight_map = {}
    for i, names in enumerate(np.array_split(sorted(tensors), shards)):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        write_safetensors(folder / file, {str(name): tensors[name] for name in names})
        weight_map |= {str(name): file for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return params


def clip_tensors(config: EncoderConfig, prefix: str = "visual."):
    """Tensors of a CLIP as open_clip names them, with a text tower; and the encoder's parameters by our paths."""
    whole = dataclasses.replace(config, attention_pool=True) if isinstance(config, CLIPResNetConfig) else config
    params = noise(abstract(lambda: build_encoder(whole, rngs=nnx.Rngs(0)))[1])
    tensors = {prefix + key: tensor.read() for key, tensor in to_theirs(encoder_table(whole), params).items()}
    if prefix:
        tensors |= {"logit_scale": np.array(1.0, np.float32), "token_embedding.weight": np.zeros((5, 4), np.float32)}
    return tensors, {path: leaf for path, leaf in params.items() if not path.startswith("attnpool/")}
