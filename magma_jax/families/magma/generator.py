"""The interface for users: images and text in, text out.

    model = Magma.from_checkpoint("runs/quickstart")
    embeddings = model.preprocess_inputs([ImageInput("cat.png"), "A picture of"])
    print(model.generate(embeddings, max_steps=20)[0])

Names follow the original. Calls change no state, so the same call gives the same answer.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from magma_jax.config import to_dict
from magma_jax.data.tokenizers.byte_level import Tokenizer
from magma_jax.families.magma.images import image_spec
from magma_jax.families.magma.loading import LAYERS, load_magma
from magma_jax.inference.answers import Answer, AnswerOptions, ImageOptions
from magma_jax.inference.asker import token_answers
from magma_jax.inference.batched import generate_tokens
from magma_jax.inference.decoding.config import Compat, SamplingConfig
from magma_jax.inference.decoding.decode import Generation
from magma_jax.inference.generator import Makes
from magma_jax.inference.prompts import (
    WORD,
    Prompt,
    PromptBatch,
    PromptLayout,
    lay_out_prompt,
)
from magma_jax.models.magma import MagmaConfig, MagmaModel
from magma_jax.models.vision.catalog import normalize_for
from magma_jax.nn.adapters import is_adapter
from magma_jax.nn.modules import Definition, abstract, merge
from magma_jax.nn.stack import stack_params
from magma_jax.runtime.compile import platform_jit, trim_after_compile
from magma_jax.storage.model_folder import write_model_folder
from magma_jax.typing import Array, Float, Int, Params
from magma_jax.version import __version__


class ForwardOutput(NamedTuple):
    """What ``Magma.__call__`` computes.

    Attributes:
        logits: (B, S, V), fp32; ids from ``vocab_rows`` on have no embedding and are meaningless.
        hidden_states: (L + 1, B, S, D): input of every block, and the output of the final LayerNorm.
        attentions: (L, B, H, S, S) attention weights.
    """

    logits: Array
    hidden_states: Array | None
    attentions: Array | None


class Magma:
    """A MAGMA model with its weights, tokenizer and image preprocessing.

    The language model's layers in ``params`` are stacked or unstacked (``lm/layers/0/...``), see ``nn.stack``.
    """

    makes: frozenset[Makes] = frozenset({"text"})

    def __init__(self, config: MagmaConfig, params: Params, tokenizer: Tokenizer):
        trim_after_compile()
        self.config, self.params, self.tokenizer = config, params, tokenizer
        self.graphdef = magma_graphdef(config, any(path.startswith(f"{LAYERS}0/") for path in params))
        self.images, self.lm_config, self.dtype, self.classes = (
            image_spec(config),
            config.lm,
            config.dtype,
            config.classes,
        )

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        *,
        dtype: str | None = None,
        mesh: jax.sharding.Mesh | None = None,
        model_config: Mapping[str, Any] | None = None,
        ema: bool | None = None,
    ) -> "Magma":
        """Loads a run folder of ``train.py``, a converted model folder, or any checkpoint that ``from-torch`` opens.

        Every tensor is read directly in its dtype and onto its devices, so loading takes little more memory than the
        model.

        Args:
            path: folder, file, or ``hf://OWNER/NAME[@REVISION][/FILE]`` for a file that is downloaded first.
            dtype: dtype of weights and activations, such as ``bfloat16``; default: the config's, which is
                ``float32`` for a checkpoint file.
            mesh: devices to shard the weights over, by the table of ``magma_jax.runtime.sharding``; default: one
                device.
            model_config: values that the tensors of a checkpoint file do not reveal, see ``published.infer_config``.
            ema: whether to use a run's moving averages instead of its weights; default: whichever the run was
                validated with.

        Raises:
            CheckpointError: not such a folder, or ``ema`` for one that keeps no averages. HubError: a failed download.
            WeightFileError, InferenceError, KeyMapError: a file that cannot be read, or whose keys do not fit a MAGMA
            model.
        """
        return cls(*load_magma(path, dtype, mesh, model_config, ema))

    def save(self, path: str | Path) -> None:
        """Writes a model folder; ``from_checkpoint`` reads the same bits.

        Raises:
            CheckpointError: ``path`` already exists, or the disk is too small.
        """
        metadata = {"model": to_dict(self.config), "magma_jax": __version__}
        params = stack_params(self.params, LAYERS)
        write_model_folder(path, metadata, params, lambda made: self.tokenizer.save(made / "tokenizer"))

    def answers(
        self,
        prompts: Iterable[Prompt],
        options: AnswerOptions | ImageOptions = AnswerOptions(),
        *,
        count: int | None = None,
    ) -> Iterator[list[Answer]]:
        """The answers to every prompt, see ``inference.generator.Generator``."""
        if isinstance(options, ImageOptions):
            raise ValueError("this model writes texts and draws no images")
        return token_answers(self, prompts, options, count)

    def layout(self, prompt: Prompt, *, max_images: int | None = None, salt: bytes = b"") -> PromptLayout:
        """The layout of a prompt, see ``inference.prompts.lay_out_prompt``."""
        return self._lay_out(prompt, max_images=max_images, salt=salt)

    def preprocess_inputs(self, inputs: Prompt) -> Float[Array, "1 S D"]:
        """Turns one prompt, any sequence of ``ImageInput`` and text, into embeddings; ``inputs`` is not changed.

        Special tokens spelled out in text are encoded as plain text.

        Raises:
            ValueError: an empty prompt, or an item that is neither text nor image. ImageError: a bad image.
        """
        return self.preprocess_batch([inputs]).embeddings

    def preprocess_batch(self, prompts: Sequence[Prompt]) -> PromptBatch:
        """Turns several prompts, of any lengths, into one batch."""
        layouts = [self._lay_out(prompt, name=f"prompt {i}") for i, prompt in enumerate(prompts)]
        if not layouts:
            raise ValueError("no prompts: give at least one")
        rows, lengths = [self._embed(layout) for layout in layouts], [len(layout) for layout in layouts]
        padded = [jnp.pad(row, ((0, max(lengths) - row.shape[0]), (0, 0))) for row in rows]
        seen = np.zeros((len(rows), self.lm_config.head_rows), bool)
        for row, layout in zip(seen, layouts, strict=True):
            row[layout.tokens[layout.places == WORD]] = True
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
        compat: Compat = None,
    ) -> list[str]:
        """Continues prompts and returns the new text of each row, up to its end of text.

        Args:
            embeddings: from ``preprocess_inputs`` or ``preprocess_batch``.
            max_steps: maximum number of new tokens.
            temperature: 0 for greedy decoding. Filters apply in the order temperature, top_k, top_p.
            top_k: number of likeliest tokens to keep; 0 for all.
            top_p: keeps the smallest set of tokens with at least this mass.
            seed: one seed per row, which gives the row the same result as on its own; or one number, from which row i
                derives its own (so equal prompts differ).
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
        """Like ``generate``, but returns token ids with lengths and log-probabilities.

        Args:
            embeddings: as for ``generate``; ``PromptBatch.repeat`` gives several samples of each prompt.
            max_steps: maximum number of new tokens.
            sampling: sampling parameters.
            seed: as for ``generate``.
            return_logits: also return all logits.
            top_logprobs: number of likeliest alternatives to return for each token.

        Raises:
            ValueError: no room in the context, or a repetition penalty for prompts whose words are unknown.
        """
        options = {"seed": seed, "return_logits": return_logits, "top_logprobs": top_logprobs}
        return generate_tokens(self, embeddings, max_steps, sampling, **options)

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
        return forward_program(
            self.graphdef, self.params, embeddings, (bool(output_hidden_states), bool(output_attentions))
        )

    def encode_images(self, pixels: np.ndarray) -> Float[Array, "B ..."]:
        """Encoder features of uint8 images (B, size, size, 3) at the encoder's size."""
        return _encode(self.graphdef, self.params, normalize_for(self.config.encoder, pixels))

    def embed_features(self, features: Float[Array, "B ..."]) -> Float[Array, "B P D"]:
        """Word-like vectors of encoder features."""
        return _project(self.graphdef, self.params, features)

    def embed_tokens(self, ids: Sequence[int] | Int[np.ndarray, " S"]) -> Float[Array, "S D"]:
        """Word embeddings of token ids; raises ValueError for ids without a row in the table."""
        rows = self.config.lm.vocab_rows
        bad = [i for i in ids if not 0 <= i < rows]
        if bad:
            raise ValueError(f"token id {bad[0]} is outside the embedding table of {rows} rows")
        return merge(self.graphdef, self.params).embed_tokens(jnp.asarray(ids, jnp.int32)[None])[0]

    def remove_adapters(self) -> "Magma":
        """The same model without adapters; its text logits equal the language model's bit for bit."""
        config = dataclasses.replace(self.config, mlp_adapter=None, attn_adapter=None, lora=None)
        params = {path: leaf for path, leaf in self.params.items() if not is_adapter(path)}
        return Magma(config, params, self.tokenizer)

    def _lay_out(self, prompt: Prompt, **options: Any) -> PromptLayout:
        return lay_out_prompt(prompt, self.tokenizer, self.images, **options)

    def _embed(self, layout: PromptLayout) -> Float[Array, "S D"]:
        words = self.embed_tokens(layout.tokens)
        if not layout.images:
            return words
        vectors = {
            key: self.embed_features(self.encode_images(pixels[None]))[0] for key, pixels in layout.pixels.items()
        }
        table = jnp.concatenate([vectors[key] for key in layout.images])
        return jnp.where((layout.places == WORD)[:, None], words, table[np.maximum(layout.places, 0)])


@functools.cache
def magma_graphdef(config: MagmaConfig, apart: bool = False) -> Definition:
    """The structure of a model; with ``apart`` the language model's layers are unstacked."""

    def create() -> MagmaModel:
        model = MagmaModel(config, rngs=nnx.Rngs(0))
        if apart:
            model.lm.unstack()
        return model

    return abstract(create)[0]


@platform_jit(static_argnames=("graphdef", "outputs"))
def forward_program(graphdef, params, embeddings, outputs) -> ForwardOutput:
    """The program of ``Magma.__call__``; ``outputs``: whether to return hidden states and attentions."""
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
