"""The interface for users: images and text in, text out.

    model = Magma.from_checkpoint("runs/quickstart")
    embeddings = model.preprocess_inputs([ImageInput("cat.png"), "A picture of"])
    print(model.generate(embeddings, max_steps=20)[0])

Names follow the original. Nothing here has state that a call could change: the same call gives the same answer.
"""

import dataclasses
import functools
import numbers
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from magma_jax.config import from_dict
from magma_jax.data.images import ImageInput
from magma_jax.data.tokenizers.byte_level import Tokenizer
from magma_jax.inference.decoding.decode import Generation, generate
from magma_jax.inference.decoding.sampling import SamplingConfig, row_keys, sampling_rows, seed_key
from magma_jax.inference.prompts import Prompt, check_prompt
from magma_jax.models.magma import SHARDINGS, MagmaConfig, MagmaModel
from magma_jax.models.vision.catalog import normalize_for
from magma_jax.nn.modules import Definition, abstract, merge
from magma_jax.published.open_magma import load_tokenizer, read_torch_magma
from magma_jax.runtime.compile import platform_jit, trim_after_compile
from magma_jax.runtime.sharding import parameter_shardings, parameter_spec, placed
from magma_jax.storage.files import holds_weights
from magma_jax.storage.hub import local_path
from magma_jax.storage.model_folder import MODEL_FILE, in_dtype, read_model_json
from magma_jax.training.checkpoints.checkpoint import read_trained_params
from magma_jax.typing import Array, Bool, Float, Int, Params

# Of the stacked layers: smaller ones stay in the caches of a CPU, and copying them costs little.
_APART_NBYTES = 128 * 2**20

# Prompts are padded to one of these lengths (then to multiples of the last), so few programs are compiled.
LENGTH_BUCKETS = (32, 48, 64, 72, 80, 96, 128, 160, 192, 256, 320, 384, 512, 640, 768, 1024, 1280, 1536, 2048)


LAYERS = "lm/layers/"


class PromptBatch(NamedTuple):
    """Prompts of different lengths, padded on the right."""

    embeddings: Float[Array, "B S D"]
    lengths: Int[Array, " B"]
    seen: Bool[Array, "B V"] | None = None  # tokens that the prompts have, for a repetition penalty

    def repeat(self, n: int) -> "PromptBatch":
        """Every prompt ``n`` times, one after another: ``n`` samples of each with one call of ``generate``."""
        return jax.tree.map(lambda leaf: jnp.repeat(leaf, n, axis=0), self)


class ForwardOutput(NamedTuple):
    """What ``Magma.__call__`` computes.

    Attributes:
        logits: (B, S, V), fp32; ids from ``vocab_rows`` on have no embedding and mean nothing.
        hidden_states: (L + 1, B, S, D): input of every block, and the output of the final LayerNorm.
        attentions: (L, B, H, S, S).
    """

    logits: Array
    hidden_states: Array | None
    attentions: Array | None


class Magma:
    """A MAGMA model with its weights, tokenizer and image preprocessing.

    The language model's layers may be stacked in ``params``, or apart (``lm/layers/0/...``), see ``nn.stack``.
    """

    def __init__(self, config: MagmaConfig, params: Params, tokenizer: Tokenizer):
        trim_after_compile()
        self.config, self.params, self.tokenizer = config, params, tokenizer
        self.graphdef = _graphdef(config, any(path.startswith(f"{LAYERS}0/") for path in params))

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        *,
        dtype: str | None = None,
        mesh: jax.sharding.Mesh | None = None,
        model_config: Mapping[str, Any] | None = None,
    ) -> "Magma":
        """Loads a run folder of ``train.py``, a converted model folder, or whatever checkpoint ``from-torch`` opens.

        Every tensor goes straight to its dtype and devices: loading takes hardly more memory than the model.

        Args:
            path: folder, file, or ``hf://OWNER/NAME[@REVISION][/FILE]`` for a file that is fetched first.
            dtype: dtype of weights and activations, such as ``bfloat16``; default: the config's, which is
                ``float32`` for a checkpoint file.
            mesh: devices to spread the weights over, by the table of ``magma_jax.runtime.sharding``; default: one
            device. model_config: what the tensors of a checkpoint file cannot tell, see ``published.infer_config``.

        Raises:
            CheckpointError: not such a folder. HubError: not fetched. WeightFileError, InferenceError, KeyMapError: a
                file that cannot be read, or whose keys do not fit a MAGMA model.
        """
        path = local_path(path)
        if not (path / MODEL_FILE).exists() and holds_weights(path):

            def place(name: str, array: np.ndarray) -> Array:
                spec = PartitionSpec() if mesh is None else parameter_spec(name, array.shape, mesh, SHARDINGS)
                return jax.device_put(array, None if mesh is None else NamedSharding(mesh, spec))

            config, params, tokenizer = read_torch_magma(path, model_config, dtype or "float32", place)
            config = dataclasses.replace(config, dtype=dtype or "float32")
            return cls(config, _for_device(params, config), tokenizer)
        config = from_dict(MagmaConfig, read_model_json(path)["model"], "model.json: model")
        config = dataclasses.replace(config, dtype=dtype or config.dtype)
        _, shapes, types = abstract(lambda: MagmaModel(config, rngs=nnx.Rngs(0)))
        shapes = in_dtype(shapes, jnp.dtype(config.dtype))
        if mesh is not None:
            shapes = placed(shapes, parameter_shardings(shapes, mesh, SHARDINGS))
        params = _for_device(read_trained_params(path, shapes, types), config)
        return cls(config, params, load_tokenizer(path))

    def preprocess_inputs(self, inputs: Prompt) -> Float[Array, "1 S D"]:
        """Turns one prompt, any sequence of ``ImageInput`` and text, into embeddings; ``inputs`` is not changed.

        Text that spells a special token is text.

        Raises:
            ValueError: an empty prompt, or an item that is neither text nor image. ImageError: a bad image.
        """
        return self.preprocess_batch([inputs]).embeddings

    def preprocess_batch(self, prompts: Sequence[Prompt]) -> PromptBatch:
        """Turns several prompts, of any lengths, into one batch."""
        rows = [self._embed_prompt(prompt, i) for i, prompt in enumerate(prompts)]
        if not rows:
            raise ValueError("no prompts: give at least one")
        lengths = [row.shape[0] for row in rows]
        padded = [jnp.pad(row, ((0, max(lengths) - row.shape[0]), (0, 0))) for row in rows]
        seen = np.zeros((len(rows), self.config.lm.head_rows), bool)
        for row, prompt in zip(seen, prompts, strict=True):
            for text in (item for item in check_prompt(prompt) if isinstance(item, str)):
                row[self.tokenizer.encode(text)] = True
        return PromptBatch(jnp.stack(padded), jnp.array(lengths), jnp.asarray(seen))

    def generate(
        self,
        embeddings: Float[Array, "B S D"] | PromptBatch,
        max_steps: int = 100,
        temperature: float | int = 0.7,
        top_k: int = 0,
        top_p: float | int = 0.9,
        *,
        seed: int | Sequence[int] = 0,
        compat: str | None = None,
    ) -> list[str]:
        """Continues prompts and returns the new text of each row, up to its end of text.

        Args:
            embeddings: from ``preprocess_inputs`` or ``preprocess_batch``.
            max_steps: new tokens at most.
            temperature: 0 for greedy. Order: temperature, top_k, top_p.
            top_k: 0 for all.
            top_p: smallest set of tokens with at least this mass.
            seed: one seed a row, each giving its row what it gives alone; or one number, from which row i draws
                its own (so equal prompts differ).
            compat: ``upstream`` for the original's top_p rule and order.

        Raises:
            ValueError: prompt and new tokens exceed the context, or a seed or sampling value out of range.
        """
        sampling = SamplingConfig(temperature, top_k, top_p, compat=compat)
        result = self.generate_tokens(embeddings, max_steps, sampling, seed=seed)
        tokens, lengths = np.asarray(result.tokens), np.asarray(result.lengths)
        return [self.tokenizer.decode(row[:length].tolist()) for row, length in zip(tokens, lengths, strict=True)]

    def generate_tokens(
        self,
        embeddings: Float[Array, "B S D"] | PromptBatch,
        max_steps: int,
        sampling: SamplingConfig = SamplingConfig(),
        *,
        seed: int | Sequence[int] = 0,
        return_logits: bool = False,
        top_logprobs: int = 0,
    ) -> Generation:
        """Like ``generate``, as token ids with lengths and log-probabilities.

        Args:
            embeddings: as for ``generate``; ``PromptBatch.repeat`` gives several samples of each prompt.
            max_steps: new tokens at most.
            sampling: how they are sampled.
            seed: as for ``generate``.
            return_logits: also return all logits.
            top_logprobs: also return so many of the likeliest tokens in place of each token.

        Raises:
            ValueError: no room in the context, or a repetition penalty for prompts whose words are not known.
        """
        batch = as_batch(embeddings)
        penalizes = sampling.repetition_penalty != 1
        if penalizes and batch.seen is None:
            raise ValueError("a repetition penalty needs the prompts' words: give what preprocess_batch returned")
        check_room(self, batch, max_steps)
        padded = pad_to_bucket(batch.embeddings)
        rows = padded.shape[0]
        result = _generate(
            self.graphdef,
            self.params,
            padded,
            batch.lengths,
            _row_keys(seed, rows),
            # One program for all numbers up to the next declared length; where to stop is data.
            max_new_tokens=padded_length(max_steps),
            limit=np.full(rows, max_steps, np.int32),
            sampling=sampling_rows([sampling] * rows),
            compat=sampling.compat,
            eos_id=self.tokenizer.eos_id,
            return_logits=return_logits,
            seen=batch.seen if penalizes else None,
            top=top_logprobs,
        )
        return result.shortened(max_steps)

    def __call__(
        self,
        embeddings: Float[Array, "B S D"],
        *,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> ForwardOutput:
        """Runs the model over embeddings; see ``ForwardOutput`` for shapes.

        Raises:
            ValueError: more positions than the context holds.
        """
        if embeddings.shape[1] > self.config.lm.context_length:
            raise ValueError(
                f"{embeddings.shape[1]} positions exceed the context of {self.config.lm.context_length}; "
                "shorten the prompt"
            )
        return _forward(self.graphdef, self.params, embeddings, (bool(output_hidden_states), bool(output_attentions)))

    def encode_images(self, pixels: np.ndarray) -> Float[Array, "B ..."]:
        """Encoder features of uint8 images (B, size, size, 3) at the encoder's size."""
        return _encode(self.graphdef, self.params, normalize_for(self.config.encoder, pixels))

    def embed_features(self, features: Float[Array, "B ..."]) -> Float[Array, "B P D"]:
        """Word-like vectors of encoder features."""
        return _project(self.graphdef, self.params, features)

    def embed_tokens(self, ids: Sequence[int]) -> Float[Array, "S D"]:
        """Word embeddings of token ids; ids without a row in the table are an error."""
        rows = self.config.lm.vocab_rows
        bad = [i for i in ids if not 0 <= i < rows]
        if bad:
            raise ValueError(f"token id {bad[0]} is outside the embedding table of {rows} rows")
        return merge(self.graphdef, self.params).embed_tokens(jnp.asarray(ids, jnp.int32)[None])[0]

    def remove_adapters(self) -> "Magma":
        """The same model without adapters: its text logits are those of the language model, bit for bit."""
        config = dataclasses.replace(self.config, mlp_adapter=None, attn_adapter=None)
        params = {path: leaf for path, leaf in self.params.items() if "_adapter/" not in path}
        return Magma(config, params, self.tokenizer)

    def _embed_prompt(self, prompt: Prompt, row: int) -> Float[Array, "S D"]:
        parts = []
        for item in check_prompt(prompt):
            if isinstance(item, ImageInput):
                pixels = item.pixels(self.config.encoder.image_size)
                parts.append(self.embed_features(self.encode_images(pixels[None]))[0])
            else:
                parts.append(self.embed_tokens(self.tokenizer.encode(item)))
        if not sum(part.shape[0] for part in parts):
            raise ValueError(f"prompt {row} is empty: give at least one image or one word")
        return jnp.concatenate(parts)


def _row_keys(seed: int | Sequence[int], rows: int) -> Array:
    if isinstance(seed, numbers.Integral):
        return row_keys(seed_key(seed), rows)
    if len(seed) != rows:
        raise ValueError(f"{len(seed)} seeds for {rows} rows; give one a row, or a single number")
    # As a batch of one draws with a single number.
    return jnp.concatenate([row_keys(seed_key(one), 1) for one in seed])


@functools.cache
def _graphdef(config: MagmaConfig, apart: bool = False) -> Definition:
    def create() -> MagmaModel:
        model = MagmaModel(config, rngs=nnx.Rngs(0))
        if apart:
            model.lm.unstack()
        return model

    return abstract(create)[0]


def layers_apart(params: Params) -> Params:
    """Takes stacked layers of the language model apart; stacks are removed from ``params`` one by one meanwhile."""
    stacks = {path: params.pop(path) for path in list(params) if path.startswith(LAYERS)}
    apart: Params = {}
    while stacks:
        path, stacked = stacks.popitem()
        name = path.removeprefix(LAYERS)
        apart |= {f"{LAYERS}{i}/{name}": jax.block_until_ready(stacked[i]) for i in range(stacked.shape[0])}
    return params | apart


def _for_device(params: Params, config: MagmaConfig) -> Params:
    """Layers of large models apart on one CPU. In half precision they stay: a CPU is slow with it for other reasons,
    and so loading takes no memory beside the model."""
    layers = [leaf for path, leaf in params.items() if path.startswith(LAYERS)]
    on_cpu = {device.platform for leaf in layers for device in leaf.sharding.device_set} == {"cpu"}
    one = all(len(leaf.sharding.device_set) == 1 for leaf in layers)
    large = sum(leaf.nbytes for leaf in layers) >= _APART_NBYTES
    return layers_apart(params) if on_cpu and one and large and config.dtype == "float32" else params


def check_room(model: Magma, batch: PromptBatch, max_steps: int) -> None:
    """Raises ValueError where prompts and ``max_steps`` new tokens do not fit the context."""
    longest, context = int(batch.lengths.max()), model.config.lm.context_length
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {max_steps}")
    if longest + max_steps > context:
        raise ValueError(
            f"the longest prompt has {longest} positions and {max_steps} new tokens were asked for, but the "
            f"context holds {context}; shorten the prompt or lower max_steps"
        )


def as_batch(embeddings: Array | PromptBatch) -> PromptBatch:
    """Prompts with their lengths; without them all are as long as the array."""
    if isinstance(embeddings, PromptBatch):
        return embeddings
    return PromptBatch(embeddings, jnp.full(embeddings.shape[0], embeddings.shape[1]))


def padded_length(length: int) -> int:
    """The declared length that holds ``length`` positions."""
    last = LENGTH_BUCKETS[-1]
    return next((bucket for bucket in LENGTH_BUCKETS if bucket >= length), -(-length // last) * last)


def pad_to_bucket(embeddings: Float[Array, "B S D"]) -> Float[Array, "B S2 D"]:
    """Embeddings padded on the right to a declared length."""
    length = embeddings.shape[1]
    return jnp.pad(embeddings, ((0, 0), (0, padded_length(length) - length), (0, 0)))


@platform_jit(static_argnames=("graphdef", "max_new_tokens", "compat", "eos_id", "return_logits", "top"))
def _generate(graphdef, params, embeddings, lengths, keys, **options) -> Generation:
    return generate(merge(graphdef, params).lm, embeddings, lengths, keys, **options)


@platform_jit(static_argnames=("graphdef", "outputs"))
def _forward(graphdef, params, embeddings, outputs) -> ForwardOutput:
    model = merge(graphdef, params)
    collect = tuple(name for name, wanted in zip(("out", "attentions"), outputs, strict=True) if wanted)
    output = model(embeddings, collect=collect)
    hidden_states = None
    if outputs[0]:
        inner = output.collected["out"][:-1]
        hidden_states = jnp.concatenate([output.inputs[None].astype(inner.dtype), inner, output.hidden[None]])
    return ForwardOutput(model.logits(output.hidden), hidden_states, output.collected.get("attentions"))


@platform_jit(static_argnames=("graphdef",))
def _encode(graphdef, params, images):
    return merge(graphdef, params).encode_images(images)


@platform_jit(static_argnames=("graphdef",))
def _project(graphdef, params, features):
    return merge(graphdef, params).embed_features(features)
