"""Answers to many prompts of images and words, in batches of few shapes, over all devices and processes.

A prompt is a sequence of texts and rows of an image source. Prompts are sorted by length to minimise padding, and image
features are cached. A common prefix of all prompts (the shots of a whole run) is run once and its keys and values are
shared. The answer to a prompt depends neither on its batch nor on the mesh.
"""

import collections
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from magma_jax.evaluation.tasks.batched_generate import (
    answer_batch,
    classify_batch,
    run_common,
    score_batch,
)
from magma_jax.inference.buckets import EVALUATION
from magma_jax.inference.decoding.config import SamplingConfig
from magma_jax.inference.generator import TokenGenerator
from magma_jax.inference.image_features import Images, encode_all
from magma_jax.inference.prompts import PromptLayout, lay_out, pad_layouts
from magma_jax.nn.transformer.cache import KVCache
from magma_jax.runtime.distributed import is_main
from magma_jax.runtime.sharding import batch_shards, local_rows, place_batch
from magma_jax.typing import Array, Float, Int

# Size of the feature cache in bytes: 600 images of CLIP RN50x16, or the whole quick start.
KEPT_NBYTES = 2**30
# Images per encoder batch.
ENCODED = 32

Parts: TypeAlias = Sequence[str | int]  # text, or the row of an image


class PromptError(ValueError):
    """A prompt that cannot be run; the message is one line with the reason."""


def join_texts(parts: Parts) -> list[str | int]:
    """The same parts with adjacent texts joined, since joint tokenization may take fewer tokens."""
    joined: list[str | int] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part if isinstance(part, str) else int(part))
    return joined


def lay_out_parts(parts: Parts, model: TokenGenerator) -> PromptLayout:
    """The layout of a prompt whose images are rows of a source."""
    return lay_out(join_texts(parts), model.tokenizer, model.images.positions)


class Answerer:
    """Answers prompts about the images of a source, on one or more devices.

    Args:
        model: model whose weights are on ``mesh``.
        images: uint8, at the encoder's size.
        batch_size: prompts per batch; affects speed, not answers.
        mesh: devices to shard batches over; None for one device.
    """

    def __init__(self, model: TokenGenerator, images: Images, *, batch_size: int = 32, mesh: Mesh | None = None):
        shards = 1 if mesh is None else batch_shards(mesh)
        self.model, self._images, self._mesh = model, images, mesh
        self._batch_size = -(-batch_size // shards) * shards
        self._rows = list(range(self._batch_size)) if mesh is None else local_rows(mesh, self._batch_size)
        self._features: collections.OrderedDict[int, np.ndarray] = collections.OrderedDict()

    def length(self, parts: Parts) -> int:
        """Number of positions of a prompt."""
        return len(lay_out_parts(parts, self.model))

    def __call__(
        self,
        prompts: Sequence[Parts],
        *,
        max_new_tokens: int,
        sampling: SamplingConfig = SamplingConfig(),
        seed: int = 0,
        common: Parts = (),
        extrapolate: bool = False,
    ) -> list[str]:
        """The model's answer to every prompt, up to its end of text.

        Args:
            prompts: at least one part each.
            max_new_tokens: maximum number of new tokens.
            sampling: sampling parameters.
            seed: random seed; the key of a prompt is derived from it and the prompt's index.
            common: common prefix of all prompts; it must end with an image or a whole word.
            extrapolate: whether prompts may exceed the context, which needs rotary positions.

        Raises:
            PromptError: an empty prompt, or one that does not fit the context.
        """
        tokenizer = self.model.tokenizer
        beginning = lay_out_parts(common, self.model)
        laid = self._lay_out(prompts, len(beginning) + max_new_tokens, extrapolate)
        prefix = self._run_common(beginning) if len(beginning) else None
        answers: list[str] = [""] * len(prompts)
        for rows, arrays in self._batches(laid):
            tokens, lengths = answer_batch(
                self.model.graphdef,
                self.model.params,
                arrays,
                np.uint32(seed),
                prefix,
                sampling=sampling,
                max_new_tokens=max_new_tokens,
                ends=tokenizer.end_ids,
                mesh=self._mesh,
            )
            for i, row, length in zip(rows, np.asarray(tokens), np.asarray(lengths), strict=True):
                answers[i] = tokenizer.decode(row[:length].tolist())
        return answers

    def classify(self, prompts: Sequence[Parts]) -> list[int]:
        """The likeliest class of every prompt, by the model's classification head.

        Raises:
            PromptError: no head, an empty prompt, or one that does not fit the context.
        """
        if not self.model.classes:
            raise PromptError(
                "this model has no classification head; finetune one that has (configs/finetune_snli_ve.py)"
            )
        classes = [0] * len(prompts)
        for rows, arrays in self._batches(self._lay_out(prompts, 0, False)):
            found = classify_batch(self.model.graphdef, self.model.params, arrays, mesh=self._mesh)
            for i, number in zip(rows, np.asarray(found).tolist(), strict=True):
                classes[i] = number
        return classes

    def next_tokens(
        self, prompts: Sequence[Parts], candidates: Sequence[Sequence[int]]
    ) -> list[Float[np.ndarray, " K"]]:
        """Log probabilities of candidates for the token after every prompt; each prompt has its own.

        Raises:
            PromptError: an empty prompt, or one that does not fit the context.
        """
        most = max(map(len, candidates), default=0)
        padded = np.array([[*tokens, *[tokens[0]] * (most - len(tokens))] for tokens in candidates], np.int32)
        scores: list[Float[np.ndarray, " K"]] = [np.empty(0)] * len(prompts)
        for rows, arrays in self._batches(self._lay_out(prompts, 0, False)):
            wanted = padded[np.array(rows)[self._rows]]
            wanted = wanted if self._mesh is None else place_batch({"": wanted}, self._mesh, self._batch_size)[""]
            found = score_batch(self.model.graphdef, self.model.params, arrays, wanted, mesh=self._mesh)
            for i, row in zip(rows, np.asarray(found), strict=True):
                scores[i] = row[: len(candidates[i])]
        return scores

    def _lay_out(self, prompts: Sequence[Parts], more: int, extrapolate: bool) -> list[PromptLayout]:
        """Layouts of the prompts; each must fit the context together with ``more`` positions."""
        laid = [lay_out_parts(prompt, self.model) for prompt in prompts]
        if any(not len(prompt) for prompt in laid):
            raise PromptError("a prompt is empty: give at least one image or one word")
        if extrapolate and "lm/wpe/weight" not in self.model.params:
            return laid
        context = self.model.lm_config.context_length
        longest = max((len(prompt) for prompt in laid), default=0)
        if longest + more > context:
            raise PromptError(
                f"the longest prompt takes {longest} positions, common shots and answer {more}, but the context holds "
                f"{context}; lower shots or max_new_tokens, or set overlong=drop_shots"
            )
        return laid

    def _batches(self, laid: Sequence[PromptLayout]) -> Iterator[tuple[list[int], dict[str, np.ndarray | Array]]]:
        """Indices of the prompts of every batch, and the batch on the devices."""
        most = max((len(prompt.images) for prompt in laid), default=0) or 1
        by_bucket: dict[int, list[int]] = collections.defaultdict(list)
        for number, prompt in enumerate(laid):
            by_bucket[EVALUATION.fit(len(prompt))].append(number)
        quiet = None if is_main() else True
        with tqdm(total=len(laid), desc="answering", unit="prompt", disable=quiet) as bar:
            for bucket, members in sorted(by_bucket.items()):
                for start in range(0, len(members), self._batch_size):
                    batch = members[start : start + self._batch_size]
                    # The last batch is padded, so that one program serves all batches of a bucket.
                    filled = batch + batch[-1:] * (self._batch_size - len(batch))
                    yield filled, self._arrays([laid[i] for i in filled], np.array(filled), bucket, most)
                    bar.update(len(batch))

    def _arrays(
        self, prompts: Sequence[PromptLayout], numbers: Int[np.ndarray, " B"], bucket: int, images: int
    ) -> dict[str, np.ndarray | Array]:
        """A batch on the devices; each process encodes and places its own rows."""
        # Prompts with fewer images are padded with an image that no position refers to.
        shown = [[*p.images, *(p.images[-1:] or (0,)) * (images - len(p.images))] for p in prompts]
        self._encode({int(image) for row in shown for image in row})
        arrays = {
            **pad_layouts([prompts[row] for row in self._rows], bucket),
            "features": np.stack([[self._features[int(image)] for image in shown[row]] for row in self._rows]),
            "numbers": numbers[self._rows].astype(np.int32),
        }
        return arrays if self._mesh is None else place_batch(arrays, self._mesh, self._batch_size)

    def _encode(self, wanted: set[int]) -> None:
        """Ensures that the features of these images are cached; evicts the least recently used ones."""
        missing = sorted(wanted - self._features.keys())
        for image in wanted & self._features.keys():
            self._features.move_to_end(image)
        if missing:
            features = encode_all(
                _Chosen(self._images, np.array(missing)),
                self.model.graphdef,
                self.model.params,
                self._mesh,
                ENCODED,
                progress=False,
            )
            self._features.update(zip(missing, features, strict=True))
        nbytes = next(iter(self._features.values())).nbytes
        while len(self._features) > max(len(wanted), KEPT_NBYTES // nbytes):
            self._features.popitem(last=False)

    def _run_common(self, beginning: PromptLayout) -> KVCache:
        self._encode(set(map(int, beginning.images)))
        features = np.stack([self._features[int(image)] for image in beginning.images])[None]
        return run_common(
            self.model.graphdef,
            self.model.params,
            features,
            beginning.tokens[None],
            beginning.places[None],
            mesh=self._mesh,
        )


class _Chosen:
    """A subset of a source's images, as a source."""

    def __init__(self, images: Images, rows: Int[np.ndarray, " N"]):
        self._images, self._rows = images, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        return self._images[self._rows[rows]]
