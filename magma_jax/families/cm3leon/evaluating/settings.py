"""Settings of the evaluation of a run."""

import dataclasses
from typing import Literal, get_args

from magma_jax.families.cm3leon.options import DrawOptions
from magma_jax.inference.decoding.config import SamplingConfig

# What is shown before a drawing. retrieved: what the run's annotation says; oracle: drawings of the same name in other
# tones, by their Unicode metadata; random: any training drawings; none: nothing.
Shown = Literal["retrieved", "oracle", "random", "none"]
SHOWN: tuple[Shown, ...] = get_args(Shown)

# How drawings are made, beside those of ``SHOWN``: with the retrieved documents of the right drawing and the text of
# another one; without guidance; by CD-K; the likeliest of two guided ones and two by CD-K.
Control = Literal["other_text", "unguided", "cd_k", "pool"]


# Candidates of the row ``pool``.
POOL = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """Settings of the evaluation of a run.

    Attributes:
        drawings: rows of the table of drawings, of ``Shown`` and ``Control``.
        guidance: s of ``u + s (c - u)``.
        cd_k: k of the row ``cd_k``.
        temperature: of the codes; at 0 the likeliest.
        top_p: draws from the likeliest codes of this mass.
        candidates: drawings of which the likeliest is kept.
        edit_guidance: weight of an edit's instruction.
        edit_image_guidance: weight of its image.
        edits: edits to judge, evenly spaced.
        text_temperature: of the tokens of a text.
        batch: prompts of a batch.
        seed: seed of every drawing and of the random documents.
    """

    drawings: tuple[str, ...] = ("retrieved", "unguided", "oracle", "random", "none", "other_text")
    guidance: float = 1.5
    cd_k: int = 4
    temperature: float = 1.0
    top_p: float = 0.9
    candidates: int = 1
    edit_guidance: float = 1.0
    edit_image_guidance: float = 1.0
    edits: int = 200
    text_temperature: float = 0.0
    batch: int = 32
    seed: int = 0

    def __post_init__(self):
        known = (*SHOWN, *get_args(Control))
        for name in self.drawings:
            if name not in known:
                raise ValueError(f"drawings name {name!r}, which is none of {', '.join(known)}")
        if "retrieved" not in self.drawings:
            raise ValueError("drawings must name 'retrieved', with which the others are compared")
        for name in ("edits", "batch", "cd_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.text_temperature < 0:
            raise ValueError(f"text_temperature must be at least 0, got {self.text_temperature}")
        self.options()  # its own checks

    def options(self, row: str = "retrieved") -> DrawOptions:
        """Options of a row's drawings."""
        return DrawOptions(
            guidance=1.0 if row in ("unguided", "cd_k") else self.guidance,
            cd_k=self.cd_k if row in ("cd_k", "pool") else 0,
            contrasted=POOL // 2 if row == "pool" else None,
            candidates=POOL if row == "pool" else self.candidates,
            temperature=(self.temperature, self.temperature),
            top_p=self.top_p,
            seed=self.seed,
        )

    def edit_options(self) -> DrawOptions:
        """Options of edits."""
        return dataclasses.replace(self.options(), guidance=self.edit_guidance, image_guidance=self.edit_image_guidance)

    def text_sampling(self) -> SamplingConfig:
        """Sampling of texts."""
        return SamplingConfig(temperature=self.text_temperature)
