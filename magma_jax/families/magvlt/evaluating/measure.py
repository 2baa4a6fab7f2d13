"""Drawing, describing and in-painting of held-out drawings, with controls.

Drawings of a text are judged as what the text says (``model``) and, as controls, as another text of the split
(``shuffled``), drawn in one step (``one_step``), and after the image tokenizer alone (``round_trip``). What the model
knows of a tone without drawing it is ``likeliest``: of the texts that differ in the tone alone, the one given which the
true drawing is likeliest. Texts of an image are compared with the true one at the predicted length, at the true length,
and with another image's text.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from magma_jax.data.openmoji import drawings
from magma_jax.data.openmoji.drawings import TONES, Drawing
from magma_jax.evaluation.drawings import DrawingJudge, Verdict
from magma_jax.families.magvlt.evaluating.edits import Edit, edits_of
from magma_jax.families.magvlt.evaluating.settings import EvaluationSettings, describe, draw, likelihoods
from magma_jax.families.magvlt.generator import Magvlt
from magma_jax.families.magvlt.prompts import encode_texts
from magma_jax.typing import UInt8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """Results of a split.

    Attributes:
        figures: shares in percent, and numbers of drawings, by part and condition.
        rows: rows of the judged drawings.
        drawn: (N, H, W, 3) their drawings.
        verdict: what the judge says of these.
        said: their texts, at the predicted length.
        edits: in-painted drawings.
        edited: (E, H, W, 3) their results.
        changed: whether each has the asked attribute.
    """

    figures: dict[str, Any]
    rows: list[int]
    drawn: UInt8[np.ndarray, "N H W 3"]
    verdict: Verdict
    said: list[str]
    edits: list[Edit]
    edited: UInt8[np.ndarray, "E H W 3"]
    changed: list[bool]


def measure(
    model: Magvlt,
    records: Sequence[Drawing],
    images: UInt8[np.ndarray, "N H W 3"],
    rows: Sequence[int],
    judge: DrawingJudge,
    settings: EvaluationSettings,
) -> Measured:
    """Draws, describes and in-paints the drawings ``rows``."""
    rows = [int(row) for row in rows]
    texts = [records[row].caption for row in rows]
    true_codes = _encoded(model, images[rows])
    figures: dict[str, Any] = {"drawing": {}, "text": {}, "edit": {}}

    codes = draw(model, texts, settings)
    drawn = _pixels(model, codes)
    verdict = judge.judge(drawn, rows)
    one_step = draw(model, texts, dataclasses.replace(settings, steps=1))
    shuffled = [*rows[1:], *rows[:1]]
    for name, verdict_, codes_ in (
        ("model", verdict, codes),
        ("one_step", judge.judge(_pixels(model, one_step), rows), one_step),
        ("shuffled", judge.judge(drawn, shuffled), None),
        ("round_trip", judge.judge(_pixels(model, true_codes), rows), true_codes),
    ):
        figures["drawing"][name] = {key: 100 * value for key, value in verdict_.shares().items()}
        if codes_ is not None:
            figures["drawing"][name] |= {
                "equal_codes": 100 * float((codes_ == true_codes).mean()),
                "psnr": _psnr(_pixels(model, codes_), images[rows]),
            }
    figures["drawing"]["likeliest"] = _likeliest_tone(model, [records[row] for row in rows], true_codes)
    figures["drawing"]["n"] = {field.name: len(getattr(verdict, field.name)) for field in dataclasses.fields(verdict)}

    _, lengths = encode_texts(texts, model.tokenizer, model.config.text_positions, "error")
    said, predicted = describe(model, true_codes, settings)
    given, _ = describe(model, true_codes, settings, lengths)
    others = [*texts[1:], *texts[:1]]
    figures["text"] = {
        "predicted_length": _equal(said, texts),
        "true_length": _equal(given, texts),
        "shuffled": _equal(said, others),
        "length": 100 * float((predicted == lengths).mean()),
        "n": len(texts),
    }

    edits = edits_of(records, images, rows, model.config.grid)
    edited, changed = _edit(model, records, images, edits, judge, settings, figures["edit"])
    return Measured(
        figures=figures,
        rows=rows,
        drawn=drawn,
        verdict=verdict,
        said=said,
        edits=edits,
        edited=edited,
        changed=changed,
    )


def _likeliest_tone(model: Magvlt, shown: Sequence[Drawing], codes: np.ndarray) -> dict[str, float]:
    """Share of drawings of one tone that are likeliest given their own text, among those of all tones and none."""
    chosen = [i for i, drawing in enumerate(shown) if len(drawing.tones) == 1]
    if not chosen:
        return {}
    tones = [*((tone,) for tone in TONES), ()]
    texts = [drawings.describe(shown[i].base, tone) for i in chosen for tone in tones]
    found = likelihoods(model, texts, codes[chosen].repeat(len(tones), axis=0)).reshape(-1, len(tones))
    right = [TONES.index(shown[i].tones[0]) for i in chosen]
    return {"tone": 100 * float((found.argmax(1) == right).mean())}


def _edit(
    model: Magvlt,
    records: Sequence[Drawing],
    images: UInt8[np.ndarray, "N H W 3"],
    edits: Sequence[Edit],
    judge: DrawingJudge,
    settings: EvaluationSettings,
    figures: dict[str, Any],
) -> tuple[UInt8[np.ndarray, "E H W 3"], list[bool]]:
    """Results of the edits and whether each has the asked attribute; fills in ``figures`` by attribute."""
    if not edits:
        return images[:0], []
    source, target = ([getattr(edit, name) for edit in edits] for name in ("source", "target"))
    codes, true_codes = (_encoded(model, images[rows]) for rows in (source, target))
    places = np.stack([edit.places for edit in edits])
    results = {
        name: draw(model, [records[row].caption for row in rows], settings, codes=codes, places=places)
        for name, rows in (("model", target), ("unchanged_text", source))
    }
    # The most that a model could reach with these masks.
    results["true_codes"] = np.where(places, true_codes, codes)
    pixels = {name: _pixels(model, found) for name, found in results.items()}
    attributes = np.array([edit.attribute for edit in edits])
    changed = {name: np.zeros(len(edits), bool) for name in results}
    for attribute in np.unique(attributes).tolist():
        mine = np.flatnonzero(attributes == attribute)
        wanted = [target[i] for i in mine]
        figures[attribute] = {"n": len(mine)}
        for name in results:
            verdict = judge.judge(pixels[name][mine], wanted)
            right = verdict.tone
            if attribute == "hair":
                nearest = judge.nearest(pixels[name][mine])
                right = np.array(
                    [records[n].concept == records[w].concept for n, w in zip(nearest, wanted, strict=True)]
                )
            changed[name][mine] = right
            figures[attribute][name] = 100 * float(right.mean())
        figures[attribute]["exact"] = 100 * float(judge.judge(pixels["model"][mine], wanted).exact.mean())
    figures["kept_codes"] = 100 * float((results["model"] == codes)[~places].mean())
    return pixels["model"], changed["model"].tolist()


def _encoded(model: Magvlt, images: UInt8[np.ndarray, "N H W 3"]) -> np.ndarray:
    assert model.image_tokenizer is not None  # the caller refuses others
    return model.image_tokenizer.encode(images)


def _pixels(model: Magvlt, codes: np.ndarray) -> UInt8[np.ndarray, "N H W 3"]:
    return np.stack([np.asarray(image) for image in model.decode(codes)])


def _psnr(images: UInt8[np.ndarray, "N H W 3"], truth: UInt8[np.ndarray, "N H W 3"]) -> float:
    """Mean over images, in dB."""
    errors = np.square(images.astype(np.float32) - truth).mean((1, 2, 3))
    return float((10 * np.log10(255**2 / np.maximum(errors, 1e-6))).mean())


def _equal(said: Sequence[str], truth: Sequence[str]) -> float:
    return 100 * float(np.mean([a.strip() == b.strip() for a, b in zip(said, truth, strict=True)]))
