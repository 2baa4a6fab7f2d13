"""The report of a run that draws: figures with their controls, drawings, how they fill in, and in-painting."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from magma_jax.data.openmoji.drawings import Drawing
from magma_jax.evaluation.report.drawn import cell, drawing_card, edit_card, figure, image, protocol_line
from magma_jax.evaluation.report.pages import fill, fill_page
from magma_jax.evaluation.report.run_report import OPENMOJI, training_charts
from magma_jax.evaluation.tables import html_table, text_table
from magma_jax.evaluation.tasks.examples import spaced
from magma_jax.families.magvlt.evaluating.measure import Measured
from magma_jax.families.magvlt.evaluating.settings import EvaluationSettings
from magma_jax.families.magvlt.generator import Magvlt
from magma_jax.inference.answers import ImageOptions
from magma_jax.output import replace_file
from magma_jax.typing import UInt8

# Drawings that are shown filling in, in-painted drawings that are shown of each attribute, and steps shown.
STRIPS, EDITS, SHOWN_STEPS = 8, 24, 10

MEASURES = {
    "exact": "exact",
    "concept": "concept",
    "tone": "tone",
    "two_tones": "two tones",
    "gender": "gender",
    "equal_codes": "equal codes",
    "psnr": "PSNR",
}
CONDITIONS = {
    "model": "model",
    "one_step": "in one step",
    "shuffled": "another text",
    "likeliest": "true drawing, likeliest with its own text",
    "round_trip": "true drawing, encoded and decoded",
}
TEXTS = {
    "predicted_length": "predicted length",
    "true_length": "true length",
    "shuffled": "another image's text",
    "length": "length right",
}
EDITED = {
    "model": "model",
    "unchanged_text": "unchanged text",
    "true_codes": "true codes",
    "exact": "exact",
}


def rows_of(figures: Mapping[str, Any]) -> list[list[list[str]]]:
    """Three tables: drawings, texts, in-painting; headings first."""
    drawing = figures["drawing"]
    measures = [name for name in MEASURES if any(name in drawing[condition] for condition in CONDITIONS)]
    counts = [f"n = {drawing['n'][name]}" if name in drawing["n"] else "" for name in measures]
    drawn = [["text to drawing, %", *(MEASURES[name] for name in measures)]]
    drawn += [[shown, *(cell(drawing[name].get(key)) for key in measures)] for name, shown in CONDITIONS.items()]
    drawn.append(["", *counts])
    text = [["drawing to text, %", *TEXTS.values(), "n"]]
    text.append(["exact", *(cell(figures["text"][name]) for name in TEXTS), str(figures["text"]["n"])])
    edit = [["in-painting, % changed", *EDITED.values(), "kept codes", "n"]]
    for attribute in ("tone", "hair"):
        if attribute in figures["edit"]:
            values = figures["edit"][attribute]
            shown = (cell(values[name]) for name in EDITED)
            edit.append([attribute, *shown, cell(figures["edit"]["kept_codes"]), str(values["n"])])
    return [drawn, text, edit]


def table(figures: Mapping[str, Any]) -> str:
    """The figures as text."""
    return "\n\n".join(text_table(rows) for rows in rows_of(figures))


def write_page(
    path: Path,
    found: Measured,
    records: Sequence[Drawing],
    images: UInt8[np.ndarray, "N H W 3"],
    model: Magvlt,
    settings: EvaluationSettings,
    protocol: Mapping[str, Any],
    metrics_file: Path,
) -> None:
    """Writes the page, atomically."""
    drawn, text, edit = rows_of(found.figures)
    page = fill_page(
        "drawings",
        title="What the model draws of names that it was not trained on",
        protocol=protocol_line(protocol),
        drawing=html_table(drawn),
        text=html_table(text),
        edit=html_table(edit),
        strips="\n".join(_strips(found, records, model, settings)),
        edits="\n".join(_edits(found, records, images, model)),
        charts=training_charts(metrics_file),
        drawings=fill("drawing_cards", cards="\n".join(_cards(found, records, images))),
        attribution=OPENMOJI,
    )
    replace_file(path, page.encode())


def _cards(found: Measured, records: Sequence[Drawing], images: UInt8[np.ndarray, "N H W 3"]) -> list[str]:
    """Each text with its drawing, the true one, and the text that the model gives to that."""
    cards = []
    for i, (row, said) in enumerate(zip(found.rows, found.said, strict=True)):
        figures = figure(found.drawn[i], "drawn") + figure(images[row], "true")
        exact, concept = bool(found.verdict.exact[i]), bool(found.verdict.concept[i])
        cards.append(drawing_card(records[row].caption, figures, said, exact=exact, concept=concept))
    return cards


def _strips(found: Measured, records: Sequence[Drawing], model: Magvlt, settings: EvaluationSettings) -> list[str]:
    """Canvases of some texts after each step."""
    strips = []
    for i in spaced(len(found.rows), STRIPS):
        text = records[found.rows[i]].caption
        options = ImageOptions(
            seed=settings.seed + i,
            steps=settings.steps,
            temperature=settings.temperature,
            guidance=settings.guidance,
            places=settings.places,
            schedule=settings.schedule,
        )
        canvases = list(model.canvases([text], options, previews=min(settings.steps, SHOWN_STEPS) - 1))
        shown = "".join(image(np.asarray(canvas.images[0]), text) for canvas in canvases)
        strips.append(f'<div class="strip"><p>{escape(text)}</p><div>{shown}</div></div>')
    return strips


def _edits(
    found: Measured, records: Sequence[Drawing], images: UInt8[np.ndarray, "N H W 3"], model: Magvlt
) -> list[str]:
    """Source, source without the codes to draw anew, result, true drawing."""
    cards = []
    for attribute in ("hair", "tone"):
        mine = [i for i, edit in enumerate(found.edits) if edit.attribute == attribute]
        for j in spaced(len(mine), EDITS):
            i = mine[j]
            edit = found.edits[i]
            assert model.image_tokenizer is not None  # refused before
            code = model.image_tokenizer.encode(images[edit.source][None])
            (hole,) = model.unfinished(code, edit.places[None])
            figures = figure(images[edit.source], "given") + figure(np.asarray(hole), "drawn anew")
            figures += figure(found.edited[i], "result") + figure(images[edit.target], "true")
            given = f"given: {records[edit.source].caption}"
            cards.append(edit_card(records[edit.target].caption, figures, given, right=bool(found.changed[i])))
    return cards
