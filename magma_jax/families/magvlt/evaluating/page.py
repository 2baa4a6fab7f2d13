"""The report of a run that draws: figures with their controls, drawings, how they fill in, and in-painting."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from magma_jax.data.openmoji.drawings import Drawing
from magma_jax.evaluation.report.pages import fill_page
from magma_jax.evaluation.report.run_report import IMAGE_SIZE, OPENMOJI, png, training_charts
from magma_jax.evaluation.tables import html_table, text_table
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
    drawn += [[shown, *(_cell(drawing[name].get(key)) for key in measures)] for name, shown in CONDITIONS.items()]
    drawn.append(["", *counts])
    text = [["drawing to text, %", *TEXTS.values(), "n"]]
    text.append(["exact", *(_cell(figures["text"][name]) for name in TEXTS), str(figures["text"]["n"])])
    edit = [["in-painting, % changed", *EDITED.values(), "kept codes", "n"]]
    for attribute in ("tone", "hair"):
        if attribute in figures["edit"]:
            values = figures["edit"][attribute]
            shown = (_cell(values[name]) for name in EDITED)
            edit.append([attribute, *shown, _cell(figures["edit"]["kept_codes"]), str(values["n"])])
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
    said = f"Step {protocol['checkpoint_step']}, training seed {protocol['training_seed']}, split {protocol['split']}. "
    said += ", ".join(f"{name} {value}" for name, value in protocol["settings"].items())
    page = fill_page(
        "drawings",
        title="What the model draws of names that it was not trained on",
        protocol=escape(said) + ".",
        drawing=html_table(drawn),
        text=html_table(text),
        edit=html_table(edit),
        strips="\n".join(_strips(found, records, model, settings)),
        edits="\n".join(_edits(found, records, images, model)),
        charts=training_charts(metrics_file),
        cards="\n".join(_cards(found, records, images)),
        attribution=OPENMOJI,
    )
    replace_file(path, page.encode())


def _cards(found: Measured, records: Sequence[Drawing], images: UInt8[np.ndarray, "N H W 3"]) -> list[str]:
    """Each text with its drawing, the true one, and the text that the model gives to that."""
    cards = []
    for i, (row, said) in enumerate(zip(found.rows, found.said, strict=True)):
        exact, concept = bool(found.verdict.exact[i]), bool(found.verdict.concept[i])
        mark = "right" if exact else "partly" if concept else "wrong"
        truth = records[row].caption
        told = f'<p class="{"right" if said.strip() == truth else "wrong"}">described as: '
        told += f'<span class="said">{escape(said)}</span></p>'
        cards.append(
            f'<article class="card pair" data-mark="{mark}"><h3>{escape(truth)}</h3>'
            f"<div>{_figure(found.drawn[i], 'drawn')}{_figure(images[row], 'true')}</div>{told}</article>"
        )
    return cards


def _strips(found: Measured, records: Sequence[Drawing], model: Magvlt, settings: EvaluationSettings) -> list[str]:
    """Canvases of some texts after each step."""
    strips = []
    for i in np.unique(np.linspace(0, len(found.rows) - 1, STRIPS).astype(int)).tolist():
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
        shown = "".join(_image(np.asarray(canvas.images[0]), text) for canvas in canvases)
        strips.append(f'<div class="strip"><p>{escape(text)}</p><div>{shown}</div></div>')
    return strips


def _edits(
    found: Measured, records: Sequence[Drawing], images: UInt8[np.ndarray, "N H W 3"], model: Magvlt
) -> list[str]:
    """Source, source without the codes to draw anew, result, true drawing."""
    cards = []
    for attribute in ("hair", "tone"):
        mine = [i for i, edit in enumerate(found.edits) if edit.attribute == attribute]
        for i in (
            [mine[j] for j in np.unique(np.linspace(0, len(mine) - 1, EDITS).astype(int)).tolist()] if mine else []
        ):
            edit = found.edits[i]
            assert model.image_tokenizer is not None  # refused before
            code = model.image_tokenizer.encode(images[edit.source][None])
            (hole,) = model.unfinished(code, edit.places[None])
            mark = "right" if found.changed[i] else "wrong"
            figures = _figure(images[edit.source], "given") + _figure(np.asarray(hole), "drawn anew")
            figures += _figure(found.edited[i], "result") + _figure(images[edit.target], "true")
            cards.append(
                f'<article class="card pair" data-mark="{mark}"><h3>{escape(records[edit.target].caption)}</h3>'
                f'<div>{figures}</div><p class="soft">given: {escape(records[edit.source].caption)}</p></article>'
            )
    return cards


def _figure(pixels: UInt8[np.ndarray, "h w 3"], caption: str) -> str:
    return f"<figure>{_image(pixels, caption)}<figcaption>{caption}</figcaption></figure>"


def _image(pixels: UInt8[np.ndarray, "h w 3"], alt: str) -> str:
    data = base64.b64encode(png(pixels)).decode()
    size = f'width="{IMAGE_SIZE}" height="{IMAGE_SIZE}"'
    return f'<img src="data:image/png;base64,{data}" {size} alt="{escape(alt)}">'


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
