"""The report of a run that draws with retrieved documents: figures with their controls, drawings and edits."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from magma_jax.evaluation.report.drawn import cell, drawing_card, edit_card, figure, protocol_line
from magma_jax.evaluation.report.pages import fill, fill_page
from magma_jax.evaluation.report.run_report import OPENMOJI, training_charts
from magma_jax.evaluation.tables import html_table, text_table
from magma_jax.evaluation.tasks.examples import spaced
from magma_jax.families.cm3leon.evaluating.measure import Material, Measured
from magma_jax.output import replace_file

# Edits that are shown.
EDITS = 24

MEASURES = {"exact": "exact", "concept": "concept", "tone": "tone", "two_tones": "two tones", "gender": "gender"}
CONDITIONS = {
    "retrieved": "retrieved documents",
    "unguided": "the same without guidance",
    "cd_k": "the same by CD-K",
    "pool": "likeliest of 2 guided, 2 by CD-K",
    "oracle": "documents by metadata",
    "random": "random documents",
    "none": "no documents",
    "other_text": "right documents, another text",
    "shuffled": "judged as another text",
    "document": "the retrieved drawing itself",
    "round_trip": "true drawing, encoded and decoded",
}
TEXTS = {
    "retrieved": "documents by image",
    "random": "random documents",
    "none": "no documents",
    "document": "text of the document",
    "shuffled": "another image's text",
}
EDITED = {
    "model": "exact",
    "source_alone": "given drawing alone",
    "other_instruction": "another instruction",
    "source": "unchanged",
    "true_codes": "true codes",
    "kept": "kept codes",
    "made": "made codes",
}


def rows_of(figures: Mapping[str, Any]) -> dict[str, list[list[str]]]:
    """Tables by name, headings first."""
    tables: dict[str, list[list[str]]] = {}
    if "drawing" in figures:
        drawing = figures["drawing"]
        measures = [name for name in MEASURES if name in drawing["retrieved"]]
        rows = [["text to drawing, %", *(MEASURES[name] for name in measures)]]
        for name, shown in CONDITIONS.items():
            if name in drawing:
                rows.append([shown, *(cell(drawing[name].get(key)) for key in measures)])
        tables["drawing"] = [*rows, ["", *(f"n = {drawing['n'][name]}" for name in measures)]]
        perplexity = figures["perplexity"]
        tables["perplexity"] = [
            ["perplexity of image codes", *(CONDITIONS[name] for name in perplexity)],
            ["held-out drawings", *(f"{value:.3f}" for value in perplexity.values())],
        ]
        if "retrieval" in figures:
            rows = [["retrieved, % of the same name", "the first", f"any of {figures['documents']}"]]
            rows += [[name, *(cell(value) for value in found.values())] for name, found in figures["retrieval"].items()]
            tables["retrieval"] = rows
        text = figures["text"]
        names = [name for name in TEXTS if name in text]
        tables["text"] = [
            ["drawing to text, %", *(TEXTS[name] for name in names), "n"],
            ["exact", *(cell(text[name]) for name in names), str(text["n"])],
        ]
    if "edit" in figures:
        rows = [["edits, %", *EDITED.values(), "n"]]
        for kind, values in figures["edit"].items():
            rows.append([kind, *(cell(values.get(name)) for name in EDITED), str(values["n"])])
        tables["edit"] = rows
    return tables


def table(figures: Mapping[str, Any]) -> str:
    """The figures as text."""
    return "\n\n".join(text_table(rows) for rows in rows_of(figures).values())


def write_page(
    path: Path, found: Measured, material: Material, protocol: Mapping[str, Any], metrics_file: Path
) -> None:
    """Writes the page, atomically."""
    tables = {name: html_table(rows) for name, rows in rows_of(found.figures).items()}
    page = fill_page(
        "retrieved",
        title="What the model makes of names that it was not trained on",
        protocol=protocol_line(protocol),
        edits="\n".join(_edits(found, material)),
        charts=training_charts(metrics_file),
        drawings=fill("drawing_cards", cards="\n".join(_cards(found, material))),
        attribution=OPENMOJI,
        **{name: tables.get(name, "") for name in ("drawing", "retrieval", "perplexity", "text", "edit")},
    )
    replace_file(path, page.encode())


def _cards(found: Measured, material: Material) -> list[str]:
    """Each text with its documents, its drawing and the true one, and the text that the model gives to that."""
    cards = []
    if found.verdict is None:
        return cards
    for i, row in enumerate(material.rows):
        figures = figure(found.drawn["retrieved"][i], "drawn") + figure(material.images[row], "true")
        figures += "".join(figure(material.images[one], material.records[one].caption) for one in found.shown[i])
        exact, concept = bool(found.verdict.exact[i]), bool(found.verdict.concept[i])
        cards.append(drawing_card(material.records[row].caption, figures, found.said[i], exact=exact, concept=concept))
    return cards


def _edits(found: Measured, material: Material) -> list[str]:
    """Given drawing, result, true drawing."""
    cards = []
    for i in spaced(len(found.edits), EDITS):
        edit = found.edits[i]
        figures = figure(material.images[edit.source], "given") + figure(found.edited[i], "result")
        figures += figure(material.images[edit.target], "true")
        given = material.records[edit.source].caption
        cards.append(edit_card(edit.instruction, figures, given, right=bool(found.changed[i])))
    return cards
