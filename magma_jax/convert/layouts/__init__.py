"""Conversions of every family that has a published layout."""

from pathlib import Path

from magma_jax.convert.layouts.cm3leon import CM3LEON
from magma_jax.convert.layouts.layout import Layout
from magma_jax.convert.layouts.magma import MAGMA
from magma_jax.convert.layouts.magvlt import MAGVLT
from magma_jax.convert.layouts.vqgan import VQGAN
from magma_jax.families import family_of_checkpoint, family_of_weights

# By name of the family.
LAYOUTS: dict[str, Layout] = {"magma": MAGMA, "vqgan": VQGAN, "magvlt": MAGVLT, "cm3leon": CM3LEON}


def layout_of_weights(path: str | Path) -> Layout:
    """The layout of a weight file; raises as ``open_tensors``."""
    return LAYOUTS.get(family_of_weights(Path(path)).name, MAGMA)


def layout_of(path: str | Path) -> Layout:
    """The layout of a weight file, model folder or run folder.

    Raises:
        CheckpointError: no such folder, or a model of no known family. Also the errors of ``open_tensors``.
    """
    # The first one says of a model without a layout what is wrong with it.
    return LAYOUTS.get(family_of_checkpoint(Path(path)).name, MAGMA)
