"""What the reports of models that draw share: figures, cards of drawings, and lines of the protocol."""

import base64
from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np

from magma_jax.evaluation.report.run_report import IMAGE_SIZE, png
from magma_jax.typing import UInt8


def cell(value: float | None) -> str:
    """A percentage of a table; ``-`` if there is none."""
    return "-" if value is None else f"{value:.1f}"


def protocol_line(protocol: Mapping[str, Any]) -> str:
    """HTML that says what the figures belong to."""
    # A folder derived from a run has no steps.
    step = f"Step {protocol['checkpoint_step']}, t" if "checkpoint_step" in protocol else "T"
    said = f"{step}raining seed {protocol['training_seed']}, split {protocol['split']}. "
    return escape(said + ", ".join(f"{name} {value}" for name, value in protocol["settings"].items())) + "."


def image(pixels: UInt8[np.ndarray, "h w 3"], alt: str) -> str:
    """HTML of an image."""
    data = base64.b64encode(png(pixels)).decode()
    size = f'width="{IMAGE_SIZE}" height="{IMAGE_SIZE}"'
    return f'<img src="data:image/png;base64,{data}" {size} alt="{escape(alt)}">'


def figure(pixels: UInt8[np.ndarray, "h w 3"], caption: str) -> str:
    """HTML of an image with its caption."""
    return f"<figure>{image(pixels, caption)}<figcaption>{escape(caption)}</figcaption></figure>"


def drawing_card(truth: str, figures: str, said: str, *, exact: bool, concept: bool) -> str:
    """HTML of a text with its images, and the text that the model gives to the true one."""
    mark = "right" if exact else "partly" if concept else "wrong"
    told = f'<p class="{"right" if said.strip() == truth else "wrong"}">described as: '
    told += f'<span class="said">{escape(said)}</span></p>'
    return f'<article class="card pair" data-mark="{mark}"><h3>{escape(truth)}</h3><div>{figures}</div>{told}</article>'


def edit_card(title: str, figures: str, below: str, *, right: bool) -> str:
    """HTML of a changed drawing."""
    mark = "right" if right else "wrong"
    return (
        f'<article class="card pair" data-mark="{mark}"><h3>{escape(title)}</h3><div>{figures}</div>'
        f'<p class="soft">{escape(below)}</p></article>'
    )
