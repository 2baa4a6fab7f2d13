"""Variable types of MAGVLT."""

from flax import nnx


class TransformerParam(nnx.Param):
    """Weight of the transformer, its tables and its token head."""

    role = "transformer"
