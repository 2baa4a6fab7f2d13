"""A family that the package does not know: a bidirectional model of tokens that guesses masked ones and the length.

It is here to prove that nothing outside of ``families`` needs to know a family by name.
"""

import dataclasses
import re
from typing import ClassVar, Literal

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from magma_jax.config import from_dict
from magma_jax.data.dataset import Dataset
from magma_jax.family import Family
from magma_jax.nn.attention import dot_product_attention
from magma_jax.nn.layers import Embedding, LayerNorm, Linear, normal
from magma_jax.nn.masks import Mask
from magma_jax.nn.modules import HeadParam, LanguageParam, abstract
from magma_jax.nn.stack import scan, stack
from magma_jax.storage.model_folder import read_model_json
from magma_jax.training.checkpoints.checkpoint import read_trained_params
from magma_jax.training.step.flops import StepFlops, attention_flops, matrix_flops
from magma_jax.training.step.optim import Group
from magma_jax.training.step.terms import Term
from tests import tiny

LENGTH, MASK, LONGEST = 16, 1, 16


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    layers: int = 2
    width: int = 32
    heads: int = 2
    vocab_rows: int = 512
    kind: Literal["toy"] = "toy"


@dataclasses.dataclass(frozen=True)
class CountingConfig:
    """Texts that count up."""

    kind: Literal["counting"] = "counting"
    may_change: ClassVar[tuple[str, ...]] = ()


@dataclasses.dataclass(frozen=True)
class ToyOptions:
    """Options of the loss that no other family has."""

    share: float = 0.4
    may_change: ClassVar[tuple[str, ...]] = ()
    adds_up: ClassVar[bool] = True

    def for_validation(self):
        return self


class ToyBlock(nnx.Module):
    def __init__(self, config, rngs):
        options = {"param": LanguageParam, "rngs": rngs}
        self.heads = config.heads
        self.ln = LayerNorm(config.width, param=LanguageParam)
        self.qkv_proj = Linear(config.width, 3 * config.width, **options)
        self.out_proj = Linear(config.width, config.width, **options)

    def __call__(self, x):
        q, k, v = jnp.split(self.qkv_proj(self.ln(x)).reshape(*x.shape[:2], self.heads, -1), 3, axis=-1)
        out, _ = dot_product_attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), Mask("full"))
        return x + self.out_proj(out.reshape(x.shape))


class ToyModel(nnx.Module):
    def __init__(self, config, rngs):
        self.config = config
        self.table = Embedding(config.vocab_rows, config.width, param=LanguageParam, weight_init=normal(0.1), rngs=rngs)
        self.layers = stack(lambda rngs: ToyBlock(config, rngs), config.layers, rngs)
        self.length_head = Linear(config.width, LONGEST + 1, param=HeadParam, rngs=rngs)

    def __call__(self, tokens):
        x = self.table(tokens, jnp.float32)
        return scan(self.layers, lambda layer, x, _: (layer(x), None), x, remat="none")[0]


def loss(model, batch, key, *, options):
    """Masked tokens are guessed from both sides, and the length of the text from its first token."""
    tokens = batch["tokens"]
    rows, length = tokens.shape
    text = jnp.arange(length) < batch["lengths"][:, None]
    drawn = jnp.arange(length) % 3 == 1 if key is None else jax.random.bernoulli(key, options.share, tokens.shape)
    hidden = model(jnp.where(drawn & text, MASK, tokens))
    guesses = optax.softmax_cross_entropy_with_integer_labels(hidden @ model.table.weight[...].T, tokens)
    lengths = optax.softmax_cross_entropy_with_integer_labels(model.length_head(hidden[:, 0]), batch["lengths"])
    return {
        "tokens": Term(jnp.where(drawn & text, guesses, 0).sum(), (drawn & text).sum()),
        "length": Term(lengths.sum(), jnp.int32(rows), weight=0.1),
    }


INPUTS = (
    (re.compile(r".*ln/weight|table/weight"), None),
    (re.compile(r"layers/.*weight"), "positions"),
    (re.compile(r"length_head/weight"), "row"),
)


def flops(config, shapes, labels, batch, options):
    rows, length = batch["tokens"]
    frozen, trained = matrix_flops(shapes, labels, INPUTS, {"positions": length, "row": 1})
    head = 6 * length * config.width * config.vocab_rows
    return StepFlops(
        rows * frozen, rows * (trained + head), rows * attention_flops(config.width, config.layers, length), 0
    )


class ToyGenerator:
    """A model that is opened but makes neither text nor images."""

    makes = frozenset()

    def __init__(self, config, graphdef, params):
        self.config, self.graphdef, self.params = config, graphdef, params

    def answers(self, prompts, options=None, *, count=None):
        raise ValueError("a toy model makes nothing that a prompt asks for")


def open_toy(path, *, dtype=None, mesh=None, ema=None):
    config = from_dict(ToyConfig, read_model_json(path)["model"], "model.json: model")
    graphdef, shapes, types = abstract(lambda: ToyModel(config, nnx.Rngs(0)))
    return ToyGenerator(config, graphdef, read_trained_params(path, shapes, types))


TOY = Family(
    name="toy",
    configs=(ToyConfig,),
    data=(CountingConfig,),
    options=ToyOptions,
    recognises=lambda keys: False,
    build=ToyModel,
    roles=lambda config: {"language": Group(), "head": Group()},
    complete=lambda config: config,
    loss=loss,
    shardings=((r"table/weight", (None, ("fsdp", "model"))), (r"length_head/weight", (None, "fsdp"))),
    vocab_rows=lambda config: config.vocab_rows,
    batch_shapes=lambda program: {
        "tokens": ((program.config.batch_size, LENGTH), jnp.int32),
        "lengths": ((program.config.batch_size,), jnp.int32),
    },
    count=lambda batch, pad_id: (len(batch["tokens"]), int(batch["lengths"].sum())),
    flops=flops,
    prepare=lambda program, dataset, params: lambda batch: batch,
    first_values=lambda program, dataset, params: {},
    fresh=r"",
    base_may_differ=lambda model: (),
    parts={},
    open=open_toy,
    decode_program=None,
    panel=None,
)


def _sample(number):
    rng = np.random.default_rng(number)
    length = int(rng.integers(4, LENGTH + 1))
    tokens = np.full(LENGTH, 2, np.int32)
    tokens[:length] = 10 + (rng.integers(0, 20) + np.arange(length)) % 20  # counts up, so that neighbours tell it
    return {"tokens": tokens, "lengths": np.int32(length)}


def dataset():
    def batches(batch_size, seed, rows):
        source = grain.MapDataset.range(4096).shuffle(seed).repeat().batch(batch_size)
        return source.map(
            lambda numbers: {
                name: np.stack([_sample(int(numbers[row]))[name] for row in rows]) for name in ("tokens", "lengths")
            }
        ).to_iter_dataset()

    def validation_batches(split, limit, batch_size, rows):
        numbers = [10**6 + first for first in range(0, min(limit, 32), batch_size)]
        return [
            {name: np.stack([_sample(number + row)[name] for row in rows]) for name in ("tokens", "lengths")}
            for number in numbers
        ]

    return Dataset(tiny.dataset().tokenizer, batches, validation_batches=validation_batches)
