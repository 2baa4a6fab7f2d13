"""Drawing, describing and editing of held-out drawings, and the perplexity of their codes, with controls.

Drawings are made with the retrieved documents of their texts and, as controls, with documents by metadata, at random
and without any, with another drawing's text behind the right documents, and judged as another text (``shuffled``).
The first retrieved drawing itself (``document``) and the true one after the image tokenizer (``round_trip``) stand
beside them. Texts are given documents found by the image: those found by the text would give it away.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from magma_jax.data.documents.openmoji_edits import Edit, examples
from magma_jax.data.openmoji.drawings import Drawing
from magma_jax.evaluation.drawings import DrawingJudge, Verdict
from magma_jax.evaluation.tasks.examples import spaced
from magma_jax.families.cm3leon.evaluating.documents import same_name, shown_rows
from magma_jax.families.cm3leon.evaluating.perplexity import image_perplexity
from magma_jax.families.cm3leon.evaluating.settings import SHOWN, EvaluationSettings
from magma_jax.families.cm3leon.generator import CM3Leon
from magma_jax.families.cm3leon.prompts import Codes
from magma_jax.typing import Int, UInt8

# Tokens of a text, at most.
TEXT_TOKENS = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Material:
    """What a run is evaluated on.

    Attributes:
        records, images: all drawings.
        rows: those to draw and to describe.
        edits: those to make.
        judge: of all drawings.
        documents: retrieved documents that the model takes.
        annotation: of what is retrieved by text; None for none.
        by_image: the same, by image.
    """

    records: Sequence[Drawing]
    images: UInt8[np.ndarray, "N H W 3"]
    rows: Sequence[int]
    edits: Sequence[Edit]
    judge: DrawingJudge
    documents: int
    annotation: str | None
    by_image: str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """Results.

    Attributes:
        figures: shares in percent, perplexities and numbers, by part and row of the table.
        drawn: drawings by row of the table.
        verdict: what the judge says of those with retrieved documents.
        shown: rows of the documents retrieved by text.
        said: texts of the drawings.
        edits: the edits that were made.
        edited: their results.
        changed: whether each is exact.
    """

    figures: dict[str, Any]
    drawn: Mapping[str, UInt8[np.ndarray, "N H W 3"]]
    verdict: Verdict | None
    shown: Sequence[Sequence[int]]
    said: Sequence[str]
    edits: Sequence[Edit]
    edited: UInt8[np.ndarray, "E H W 3"]
    changed: Sequence[bool]


def measure(model: CM3Leon, material: Material, settings: EvaluationSettings) -> Measured:
    """Draws and describes the drawings, measures their perplexity, and makes the edits."""
    code = _Coder(model, material.images)
    drawn: dict[str, Any] = {}
    found: dict[str, Any] = {"verdict": None, "shown": [], "said": []}
    figures: dict[str, Any] = {"documents": material.documents}
    if len(material.rows):
        figures["drawing"], drawn, found["verdict"], found["shown"] = _draw(model, material, settings, code)
        figures["perplexity"] = _perplexity(model, material, settings, code)
        figures["text"], found["said"] = _describe(model, material, settings, code)
        if material.annotation and material.by_image:
            shown = {"by text": found["shown"], "by image": _shown("retrieved", material, settings, by_image=True)}
            figures["retrieval"] = {
                name: same_name(material.records, material.rows, one) for name, one in shown.items()
            }
    edits = [material.edits[i] for i in spaced(len(material.edits), settings.edits)]
    edited, changed = material.images[:0], []
    if edits:
        figures["edit"], edited, changed = _edit(model, material, edits, settings, code)
    return Measured(figures=figures, drawn=drawn, edits=edits, edited=edited, changed=changed, **found)


class _Coder:
    """Codes and pixels of drawings; each is encoded once."""

    def __init__(self, model: CM3Leon, images: UInt8[np.ndarray, "N H W 3"]):
        self._model, self._images = model, images
        self._known: dict[int, Int[np.ndarray, " T"]] = {}

    def codes(self, rows: Sequence[int]) -> Int[np.ndarray, "N T"]:
        """Codes of real drawings."""
        assert self._model.images is not None  # runs without one are refused
        new = sorted(set(rows) - self._known.keys())
        if new:
            self._known |= dict(zip(new, self._model.images.encode(self._images[new]), strict=True))
        return np.stack([self._known[row] for row in rows])

    def pixels(self, codes: Int[np.ndarray, "N T"]) -> UInt8[np.ndarray, "N H W 3"]:
        """Drawings of codes."""
        return np.stack([np.asarray(image) for image in self._model.media.images_of(codes)])

    def documents(self, records: Sequence[Drawing], rows: Sequence[Sequence[int]]) -> list[list[tuple[str, Codes]]]:
        """Pairs of text and codes of the documents of every prompt."""
        self.codes(sorted({row for some in rows for row in some}) or [0])
        return [[(records[row].caption, Codes(self._known[row])) for row in some] for some in rows]


def _draw(
    model: CM3Leon, material: Material, settings: EvaluationSettings, code: _Coder
) -> tuple[dict[str, Any], dict[str, Any], Verdict, list[list[int]]]:
    records, rows = material.records, list(material.rows)
    texts = [records[row].caption for row in rows]
    figures: dict[str, Any] = {}
    drawn: dict[str, Any] = {}
    shown = _shown("retrieved" if material.annotation else "none", material, settings)
    for name in settings.drawings:
        if name in SHOWN and name != "retrieved" and not material.documents:
            continue  # the model takes no documents: all these rows would be the same
        mine = _shown(name, material, settings) if name in SHOWN and name != "retrieved" else shown
        asked = [*texts[1:], *texts[:1]] if name == "other_text" else texts
        codes = model.draw_codes(
            asked, settings.options(name), documents=code.documents(records, mine), batch=settings.batch
        )
        drawn[name] = code.pixels(np.concatenate(codes))
    verdict = material.judge.judge(drawn["retrieved"], rows)
    verdicts = {name: material.judge.judge(pixels, rows) for name, pixels in drawn.items()}
    verdicts["shuffled"] = material.judge.judge(drawn["retrieved"], [*rows[1:], *rows[:1]])
    if all(shown):
        verdicts["document"] = material.judge.judge(material.images[[some[0] for some in shown]], rows)
    verdicts["round_trip"] = material.judge.judge(code.pixels(code.codes(rows)), rows)
    for name, one in verdicts.items():
        figures[name] = {key: 100 * value for key, value in one.shares().items()}
    figures["n"] = {field.name: len(getattr(verdict, field.name)) for field in dataclasses.fields(verdict)}
    return figures, drawn, verdict, shown


def _perplexity(model: CM3Leon, material: Material, settings: EvaluationSettings, code: _Coder) -> dict[str, Any]:
    texts, codes = [material.records[row].caption for row in material.rows], code.codes(list(material.rows))
    kinds = SHOWN if material.annotation else ("none",)
    return {
        kind: image_perplexity(
            model,
            texts,
            codes,
            code.documents(material.records, _shown(kind, material, settings)),
            batch=settings.batch,
        )
        for kind in kinds
    }


def _describe(
    model: CM3Leon, material: Material, settings: EvaluationSettings, code: _Coder
) -> tuple[dict[str, Any], list[str]]:
    texts = [material.records[row].caption for row in material.rows]
    images = [Codes(codes) for codes in code.codes(list(material.rows))]
    figures: dict[str, Any] = {"n": len(texts)}
    said: dict[str, list[str]] = {}
    for kind in ("retrieved", "random", "none") if material.by_image else ("none",):
        shown = _shown(kind, material, settings, by_image=True)
        said[kind] = model.captions(
            images,
            documents=code.documents(material.records, shown),
            max_new_tokens=TEXT_TOKENS,
            sampling=settings.text_sampling(),
            seed=settings.seed,
            batch=settings.batch,
        )
        figures[kind] = _equal(said[kind], texts)
        if kind == "retrieved":
            # A model that was trained without documents is shown none.
            figures["document"] = _equal([material.records[some[0]].caption if some else "" for some in shown], texts)
    best = said["retrieved" if material.by_image else "none"]
    figures["shuffled"] = _equal(best, [*texts[1:], *texts[:1]])
    return figures, best


def _edit(
    model: CM3Leon, material: Material, edits: Sequence[Edit], settings: EvaluationSettings, code: _Coder
) -> tuple[dict[str, Any], UInt8[np.ndarray, "E H W 3"], list[bool]]:
    sources, targets = code.codes([one.source for one in edits]), code.codes([one.target for one in edits])
    asked = [(Codes(codes), one.instruction) for codes, one in zip(sources, edits, strict=True)]
    instructions = sorted({instruction for _, instruction in asked})
    following = dict(zip(instructions, [*instructions[1:], *instructions[:1]], strict=True))
    other = [(image, following[instruction]) for image, instruction in asked]
    found = [[] if one is None else [one] for one in examples(material.records, edits)]
    shown = code.documents(material.records, found if model.config.references else [[] for _ in edits])
    runs = {"model": (asked, shown), "other_instruction": (other, shown)}
    if any(shown):
        runs["source_alone"] = asked, [[] for _ in edits]
    codes = {
        name: np.concatenate(
            model.edit_codes(wanted, settings.edit_options(), documents=documents, batch=settings.batch)
        )
        for name, (wanted, documents) in runs.items()
    }
    made = codes["model"]
    rows = [one.target for one in edits]
    figures: dict[str, Any] = {}
    kinds = np.array([_attribute(one.instruction) for one in edits])
    pixels = {name: code.pixels(one) for name, one in codes.items()}
    pixels |= {"source": code.pixels(sources), "true_codes": code.pixels(targets)}
    exact = {name: material.judge.judge(found, rows).exact for name, found in pixels.items()}
    same = sources == targets
    for kind in ("all", *np.unique(kinds).tolist()):
        mine = np.ones(len(edits), bool) if kind == "all" else kinds == kind
        figures[kind] = {name: 100 * float(right[mine].mean()) for name, right in exact.items()}
        # Codes that source and answer have in common, and of the others those that become the answer's.
        figures[kind] |= {
            "kept": 100 * float((made == sources)[mine][same[mine]].mean()),
            "made": 100 * float((made == targets)[mine][~same[mine]].mean()),
            "n": int(mine.sum()),
        }
    return figures, pixels["model"], exact["model"].tolist()


def _shown(kind: Any, material: Material, settings: EvaluationSettings, *, by_image: bool = False) -> list[list[int]]:
    return shown_rows(
        kind,
        material.records,
        material.rows,
        material.documents,
        annotation=material.by_image if by_image else material.annotation,
        seed=settings.seed,
    )


def _attribute(instruction: str) -> str:
    """Which attribute an instruction of ``data.documents.openmoji_edits`` changes."""
    if "skin tone" in instruction:
        return "tone"
    return "hair" if "hair" in instruction or instruction.endswith(("bald", "beard")) else "gender"


def _equal(said: Sequence[str], truth: Sequence[str]) -> float:
    return 100 * float(np.mean([a.strip() == b.strip() for a, b in zip(said, truth, strict=True)]))
