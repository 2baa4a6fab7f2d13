"""MAGVLT in the layout of its released checkpoints, with or without the image tokenizer."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from magma_jax.convert.golden import GoldenError, inputs_of
from magma_jax.convert.layouts.layout import (
    Layout,
    absent_folder,
    in_order,
    read_source,
    write_checkpoint,
    write_folder,
)
from magma_jax.convert.magma_checkpoint import absent
from magma_jax.data.tokenizers.byte_level import Tokenizer
from magma_jax.data.tokenizers.clip_bpe import clip_bpe
from magma_jax.families.magvlt.decoding.image import ImageRun, inpaint
from magma_jax.families.magvlt.decoding.open_model import OpenModel
from magma_jax.families.magvlt.decoding.text import TextRun, image_to_text, length_logits
from magma_jax.families.magvlt.generator import Magvlt
from magma_jax.families.magvlt.loading import open_folder
from magma_jax.inference.decoding.config import SamplingConfig
from magma_jax.inference.decoding.masked import Filled, ImageRule, ImageSteps, Trace
from magma_jax.inference.decoding.sampling import sampling_rows
from magma_jax.models.magvlt.layout import Order, attention_mask, layout_of
from magma_jax.models.magvlt.model import Canvas
from magma_jax.nn.modules import merge
from magma_jax.published.keymap.engine import to_theirs
from magma_jax.published.open_magvlt import magvlt_table, open_torch_magvlt
from magma_jax.storage.model_folder import CheckpointError

# Cases of a golden forward pass, and their order.
CASES: dict[str, Order] = {
    **dict.fromkeys(("t2i", "t2i_sel"), "text_first"),
    **dict.fromkeys(("i2t", "it2it", "i2t_lr", "i2t_tb"), "image_first"),
}
INPUTS = ("img", "txt", "n_txt", "loc_mask", "selectors", "txt_mask", "N_given", "src_codes", "keep", "r")


def from_torch(
    checkpoint: str | Path,
    out: str | Path,
    model_config: Mapping[str, Any] | None = None,
    tokenizer: Tokenizer | None = None,
) -> str:
    """Converts a file to a model folder, in the file's dtypes, see ``open_torch_magvlt``.

    Raises:
        ValueError: a tokenizer of texts is given. CheckpointError: ``out`` already exists, or the disk is too small.
        Also the errors of ``open_torch_magvlt``.
    """
    absent_folder(out)
    if tokenizer is not None:
        raise ValueError("--tokenizer: a MAGVLT checkpoint has CLIP's vocabulary; leave it out")
    with open_torch_magvlt(checkpoint, model_config) as model:
        config = model.config
        words = clip_bpe()
        write_folder(
            checkpoint,
            out,
            config,
            model.params,
            model.files,
            model.source,
            lambda folder: words.save(folder / "tokenizer"),
        )
    images = "no image tokenizer" if config.tokenizer is None else f"images of {config.tokenizer.image_size} pixels"
    return f"{config.layers} layers of width {config.width}, {config.image_rows} codes, {images}"


def published(folder: str | Path) -> dict[str, Any]:
    """A folder's tensors under the released keys, in the source's order.

    Raises:
        CheckpointError: not such a folder, or a model that the published layout cannot hold.
    """
    config, params = open_folder(folder)
    if config.causal:
        raise CheckpointError(f"{folder}: the published layout is of bidirectional models, but this one is causal")
    for name in ("caption_vector", "context_head"):
        if getattr(config, name):
            said = name.replace("_", " ")
            raise CheckpointError(f"{folder}: the published layout has no {said}, but the model has one")
    if config.image_patch > 1:
        raise CheckpointError(
            f"{folder}: in the published layout every code has a position, but in the model {config.image_patch**2} "
            "codes share one"
        )
    if config.tokenizer is not None and config.tokenizer.patch > 1:
        raise CheckpointError(
            f"{folder}: the published layout has no patches, but the image tokenizer's are of {config.tokenizer.patch} "
            "pixels"
        )
    return in_order(to_theirs(magvlt_table(config), params), read_source(folder)["keys"])


def to_torch(folder: str | Path, checkpoint: str | Path) -> None:
    """Writes a model folder or a run as a PyTorch file.

    Raises:
        FileExistsError: ``checkpoint`` already exists. CheckpointError: not such a folder.
    """
    absent(checkpoint)
    write_checkpoint(checkpoint, published(folder), read_source(folder)["counters"])


def quantities(
    checkpoint: Path, arrays: Mapping[str, np.ndarray], model_config: Mapping[str, Any] | None
) -> Iterator[tuple[str, Any]]:
    """Forward passes of ``CASES``, or whole runs that take the likeliest token and the most confident places.

    A file with ``t2i/final_code``, ``it2i/final_code`` or ``i2t/tokens`` holds runs; ``t2i/mask_before`` and
    ``i2t/masks`` give their steps.
    """
    model = Magvlt.from_checkpoint(checkpoint, dtype="float32").model
    # The end token is the last of the vocabulary, as in CLIP's.
    model = dataclasses.replace(model, pad_id=model.config.text_rows - 1)
    with jax.default_matmul_precision("highest"):
        if any(f"{case}/hidden" in arrays for case in CASES):
            yield from _forward(model, arrays)
        else:
            yield from _runs(model, arrays)


def _forward(model: OpenModel, arrays: Mapping[str, np.ndarray]) -> Iterator[tuple[str, Any]]:
    config = model.config
    for case, order in CASES.items():
        if f"{case}/hidden" not in arrays:
            continue
        layout = layout_of(config, order)
        masked = inputs_of(arrays, f"{case}/loc_mask", (None, config.length), "b")
        selectors = arrays.get(f"{case}/selectors")
        canvas = Canvas(
            image=inputs_of(arrays, f"{case}/img", (len(masked), config.image_positions), "iu").astype(np.int32),
            text=inputs_of(arrays, f"{case}/txt", (len(masked), config.text_positions), "iu").astype(np.int32),
            text_lengths=inputs_of(arrays, f"{case}/n_txt", (len(masked),), "iu").astype(np.int32),
            image_masked=masked[:, layout.image : layout.image + config.image_positions],
            text_masked=masked[:, layout.text : layout.text + config.text_positions],
            selectors=None if selectors is None else selectors.astype(np.int32),
        )

        @jax.jit
        def run(params: Any, canvas: Any, order: Any = order, layout: Any = layout) -> dict[str, Any]:
            module = merge(model.definition, params)
            mask = attention_mask(config, order, canvas.text_lengths)
            hidden = module(module.embed(order, canvas), mask=mask).hidden
            image = hidden[:, layout.image : layout.image + config.image_positions]
            text = hidden[:, layout.text : layout.text + config.text_positions]
            return {
                "attn_mask_effective": mask.dense(config.length, config.length),
                "hidden": hidden,
                "logits_img": module.logits(image, "image"),
                "logits_txt": module.logits(text, "text"),
                "length_logits": module.length_logits(hidden[:, layout.bot]),
            }

        for name, value in run(model.params, canvas).items():
            yield f"{case}/{name}", value


def _runs(model: OpenModel, arrays: Mapping[str, np.ndarray]) -> Iterator[tuple[str, Any]]:
    config, side = model.config, model.config.grid
    text = layout_of(config, "text_first")
    places = slice(text.image, text.image + config.image_positions)
    for case, given in (("t2i", False), ("it2i", True)):
        if f"{case}/final_code" not in arrays:
            continue
        tokens = inputs_of(arrays, "t2i/txt", (None, config.text_positions), "iu")
        lengths = inputs_of(arrays, "t2i/txt_mask", tokens.shape, "b").sum(-1)
        rows, steps = len(tokens), len(arrays[f"{case}/mask_before"])
        codes, editable = (
            np.zeros((rows, config.image_positions), np.int32),
            np.ones((rows, config.image_positions), bool),
        )
        if given:
            codes = np.broadcast_to(arrays["it2i/src_codes"], codes.shape)
            editable = np.broadcast_to(arrays["it2i/keep"].reshape(1, -1) == 0, codes.shape)
        run = ImageRun(settings=ImageSteps(steps=steps), rule=ImageRule("maskgit"), draw=_likeliest, record=steps)
        filled = inpaint(model, codes, editable, tokens, lengths, _keys(rows), run)
        yield f"{case}/final_code", np.asarray(filled.tokens).reshape(rows, *side)
        yield from _placed(f"{case}/mask_before", arrays, places, _trace(filled).masked)
        yield from _placed(f"{case}/confidence", arrays, places, _trace(filled).scores)
    if "i2t/tokens" in arrays:
        yield from _texts(model, arrays)


def _texts(model: OpenModel, arrays: Mapping[str, np.ndarray]) -> Iterator[tuple[str, Any]]:
    config = model.config
    codes = inputs_of(arrays, "i2t/img", (None, config.image_positions), "iu")
    found = np.asarray(length_logits(model, codes))
    yield "i2t/length_logits", found
    yield "i2t/N_pred", found.argmax(-1) + 1
    steps = len(arrays["i2t/masks"])
    # Settings of the golden runs.
    sampling = sampling_rows([SamplingConfig(temperature=0.7, top_k=10)] * len(codes))
    run = TextRun(steps=steps, remask="topk", draw=_likeliest, record=steps)
    filled, _ = image_to_text(model, codes, _keys(len(codes)), sampling, run, lengths=arrays["i2t/N_given"])
    places = slice(layout_of(config, "image_first").text, None)
    yield "i2t/tokens", filled.tokens
    yield "i2t/score", filled.log_probs.sum(-1)
    yield from _placed("i2t/masks", arrays, places, _trace(filled).masked)
    before = np.concatenate([np.zeros((1, *filled.tokens.shape)), np.asarray(_trace(filled).scores)[:-1]])
    yield "i2t/prev_log_probs", before


def _placed(
    name: str, arrays: Mapping[str, np.ndarray], places: slice, values: Any
) -> Iterator[tuple[str, np.ndarray]]:
    """Values at the places of a modality in an array of whole sequences; elsewhere the array's own."""
    if name in arrays:
        whole = arrays[name].copy()
        if whole[..., places].shape != values.shape:
            raise GoldenError(f"golden array {name!r} is {list(whole.shape)}, which does not fit the model")
        whole[..., places] = values
        yield name, whole


def _trace(filled: Filled) -> Trace:
    assert filled.trace is not None  # asked for by ``record``
    return filled.trace


def _likeliest(key: Any, logits: Any, temperature: Any) -> Any:
    return logits.argmax(-1).astype(np.int32)


def _keys(rows: int) -> Any:
    return jax.random.split(jax.random.key(0), rows)


MAGVLT = Layout(
    from_torch=from_torch,
    to_torch=to_torch,
    params=lambda folder: open_folder(folder)[1],
    published=published,
    golden_inputs=frozenset(f"{case}/{name}" for case in (*CASES, "it2i") for name in INPUTS),
    quantities=quantities,
)
