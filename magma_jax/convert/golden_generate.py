"""Greedy generation on the prompts of a golden file.

    gen1   [images[0], text_a[0]]                          gent   [text_a[0]]
    gen2   [images[0], text_a[0], images[1], text_b[1]]    genb   [images[i], text_a[i]] for every row i

Each has ``embeddings``, ``out`` (placeholders for the prompt, then the new tokens), ``new_tokens`` and
``logits_cached`` with a cache, ``*_nocache`` without one, and ``final_past_*_last_layer``. ``geneos`` repeats ``genb``
with another end-of-text id; the original then continues until all rows of a batch end in the same step, so that
``out_batch`` never ends and ``kept_batch`` is the part before each row's end.

All prompts run as one ragged batch, which also checks that a row's result does not depend on the others.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from magma_jax.convert.golden import GoldenError, inputs_of
from magma_jax.convert.golden_run import Quantities, Subject
from magma_jax.inference.decoding.config import SamplingConfig
from magma_jax.inference.decoding.decode import Generation, generate
from magma_jax.inference.decoding.sampling import mask_missing_ids, remove_after_eos, row_keys, sampling_rows
from magma_jax.nn.modules import merge
from magma_jax.typing import Array

# Id that is never sampled: one compiled program serves runs with and without an end token.
NO_END = -1


def generations(subject: Subject) -> Quantities:
    """Generations of the golden file."""
    golden = subject.golden
    wanted = {match[1] for match in subject.names(r"(gen\w+)/.*")}
    if not wanted:
        return
    parts = _prompts(subject, wanted)
    steps = _steps(subject, parts)
    batch = _Batch(subject, [row for rows in parts.values() for row in rows], max(steps.values()))
    run = batch.generate(NO_END)
    assert run.logits is not None  # requested
    start = 0
    for name, rows in parts.items():
        at, length, n = slice(start, start + len(rows)), len(rows[0]), steps[name]
        start += len(rows)
        tokens = np.asarray(run.tokens[at])[:, :n]
        yield f"{name}/embeddings", np.stack(rows)
        yield f"{name}/new_tokens", tokens
        yield f"{name}/out", _with_placeholders(subject, tokens, length)
        logits = np.asarray(run.logits[at])[:, :n]
        few = golden.get(f"{name}/logits_cached", logits).shape[1] == 2
        yield f"{name}/logits_cached", logits[:, [0, -1]] if few else logits
        for kind, cache in (("key", run.cache.key), ("value", run.cache.value)):
            yield f"{name}/final_past_{kind}_last_layer", cache[-1][at, :, : length + n - 1]
        if subject.names(f"{name}/.*_nocache"):
            logits = batch.recompute(run.tokens)[at, :n]
            yield f"{name}/logits_nocache", logits
            known = mask_missing_ids(logits.reshape(-1, logits.shape[-1]), subject.config.lm.vocab_rows)
            yield f"{name}/new_tokens_nocache", known.argmax(-1).reshape(tokens.shape)
        if name == "genb" and "geneos/eos_token" in golden:
            ended = batch.generate(int(golden["geneos/eos_token"]))
            yield from _ended(subject, np.asarray(ended.tokens[at])[:, :n], tokens, length)


def _prompts(subject: Subject, wanted: set[str]) -> dict[str, list[np.ndarray]]:
    """Embeddings of every prompt, (S, D) each."""
    golden, rows = subject.golden, len(subject.images)
    model = merge(subject.graphdef, subject.params)
    text_a = inputs_of(golden, "text_a", (rows, None), "iu").astype(np.int32)
    images, words = np.asarray(_embed_images(subject.graphdef, subject.params, subject.images)), model.embed_tokens
    a = np.asarray(words(jnp.asarray(text_a)))
    prompts = {}
    if "gen1" in wanted:
        prompts["gen1"] = [np.concatenate([images[0], a[0]])]
    if "gen2" in wanted:
        if rows < 2:
            raise GoldenError("gen2 needs two images in the golden file")
        text_b = inputs_of(golden, "text_b", (rows, None), "iu").astype(np.int32)
        b = np.asarray(words(jnp.asarray(text_b)))
        prompts["gen2"] = [np.concatenate([images[0], a[0], images[1], b[1]])]
    if wanted & {"genb", "geneos"}:
        prompts["genb"] = [np.concatenate([images[i], a[i]]) for i in range(rows)]
    if "gent" in wanted:
        prompts["gent"] = [a[0]]
    return prompts


def _steps(subject: Subject, parts: dict[str, list[np.ndarray]]) -> dict[str, int]:
    """Number of new tokens of each generation, from the shapes in the golden file."""
    golden, steps = subject.golden, {}
    for name, rows in parts.items():
        length = len(rows[0])
        counts = [golden[key].shape[1] for key in (f"{name}/new_tokens", f"{name}/new_tokens_nocache") if key in golden]
        counts += [golden[key].shape[1] - length for key in (f"{name}/out", "geneos/out_batch") if key in golden]
        if name != "genb":
            counts = [count for count in counts if count > 0][:1]
        steps[name] = max(counts, default=1)
        if length + steps[name] > subject.config.lm.context_length:
            raise GoldenError(f"{name}: {length} + {steps[name]} positions exceed the model's context")
    return steps


def _ended(subject: Subject, tokens: np.ndarray, endless: np.ndarray, length: int) -> Quantities:
    """Results of a run that ends at ``geneos/eos_token``, and of one that never ends."""
    eos, image = int(subject.golden["geneos/eos_token"]), _image_token(subject)
    kept = [remove_after_eos(row, eos, image) for row in tokens]
    through_eos = 1 + int(np.argmax(tokens[0] == eos)) if eos in tokens[0] else tokens.shape[1]
    yield "geneos/out_single", _with_placeholders(subject, tokens[:1, :through_eos], length)
    yield "geneos/kept_single", np.array(kept[0])
    yield "geneos/out_batch", _with_placeholders(subject, endless, length)
    columns = max(map(len, kept))
    yield "geneos/kept_batch", np.array([row + [-1] * (columns - len(row)) for row in kept])


def _image_token(subject: Subject) -> int:
    return int(subject.settings.get("image_token", subject.config.lm.vocab_rows - 1))


def _with_placeholders(subject: Subject, tokens: np.ndarray, length: int) -> np.ndarray:
    """Prepends the image token for every prompt position, text included, as the original does."""
    return np.pad(tokens, ((0, 0), (length, 0)), constant_values=_image_token(subject))


class _Batch:
    """Right-padded prompts of different lengths, with room for ``steps`` new tokens each."""

    def __init__(self, subject: Subject, rows: list[np.ndarray], steps: int):
        self.graphdef, self.params, self.steps = subject.graphdef, subject.params, steps
        self.lengths = np.array([len(row) for row in rows], np.int32)
        self.embeddings = np.stack([np.pad(row, ((0, self.lengths.max() - len(row)), (0, 0))) for row in rows])

    def generate(self, eos_id: int) -> Generation:
        return _generate(self.graphdef, self.params, self.embeddings, self.lengths, eos_id, self.steps)

    def recompute(self, tokens: Any) -> Array:
        """Logits from which ``tokens`` (B, N) were chosen, computed without a cache."""
        return _recompute(self.graphdef, self.params, self.embeddings, self.lengths, tokens)


@functools.partial(jax.jit, static_argnames=("graphdef", "steps"))
def _generate(graphdef, params, embeddings, lengths, eos_id, steps):
    keys = row_keys(jax.random.key(0), embeddings.shape[0])
    options: dict[str, Any] = {
        "sampling": sampling_rows([SamplingConfig()] * embeddings.shape[0]),
        "ends": (eos_id,),
        "return_logits": True,
    }
    return generate(merge(graphdef, params).lm, embeddings, lengths, keys, max_new_tokens=steps, **options)


@functools.partial(jax.jit, static_argnames=("graphdef",))
def _embed_images(graphdef, params, images):
    return merge(graphdef, params).embed_images(images)


@functools.partial(jax.jit, static_argnames=("graphdef",))
def _recompute(graphdef, params, embeddings, lengths, tokens):
    model = merge(graphdef, params)
    rows, steps = jnp.arange(tokens.shape[0])[:, None], lengths[:, None] - 1 + jnp.arange(tokens.shape[1])
    sequence = jnp.pad(embeddings, ((0, 0), (0, tokens.shape[1]), (0, 0)))
    sequence = sequence.at[rows, steps + 1].set(model.embed_tokens(tokens))
    return model.logits(model(sequence).hidden[rows, steps])
