"""Writes the table of language models in docs/language_models.md, from what is registered.

python scripts/language_model_table.py           # writes it
python scripts/language_model_table.py --check   # exits with 1 if it is not up to date
"""

import sys
from pathlib import Path

from magma_jax.models.language.catalog import PUBLISHED_LANGUAGE_MODELS, LanguageModelConfig
from magma_jax.nn.activations import ACTIVATIONS
from magma_jax.nn.transformer.config import BlockConfig, TrunkConfig

DOCUMENT = Path(__file__).parent.parent / "docs" / "language_models.md"
BEGIN, END = "<!-- table: python scripts/language_model_table.py -->\n", "<!-- end of table -->\n"

RESIDUAL = {
    "shared": "parallel attention and MLP on one norm",
    "parallel": "parallel attention and MLP, a norm before each",
    "sequential": "norms before",
    "post": "norms after",
    "sandwich": "norms before and after",
}
HEADS = {"bias": "untied, with bias", "no_bias": "untied", "tied": "tied"}


def table() -> str:
    """The table: one row per kind, with the default config's layers."""
    by_kind: dict[str, list[str]] = {}
    for name, config in PUBLISHED_LANGUAGE_MODELS.items():
        by_kind.setdefault(config.kind, []).append(name)
    lines = ["| `kind` | positions | a layer | head | published sizes |", "|---|---|---|---|---|"]
    for kind, names in by_kind.items():
        configs = [PUBLISHED_LANGUAGE_MODELS[name] for name in names]
        trunk = configs[0].trunk()
        heads = " or ".join(sorted({HEADS[config.head] for config in configs}))
        cells = [f"`{kind}`", positions(trunk), layer(configs[0], trunk), heads, ", ".join(f"`{n}`" for n in names)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def positions(trunk: TrunkConfig) -> str:
    """How a model knows positions."""
    rotary = trunk.block.rotary
    if trunk.positions is not None:
        return "learned"
    if rotary is None:
        return "none"
    pairs = "neighbouring pairs" if rotary.interleaved else "half-split pairs"
    part = "" if rotary.features == trunk.block.size else f" of {rotary.features} features in {trunk.block.size}"
    kinds = set(trunk.rotary or ())
    some = ", not in every layer" if None in kinds else f", {len(kinds)} bases" if len(kinds) > 1 else ""
    return f"rotary, {pairs}{part}{some}"


def layer(config: LanguageModelConfig, trunk: TrunkConfig) -> str:
    """What attention and MLP are like."""
    block: BlockConfig = trunk.block
    windows = set(trunk.windows or ())
    window = max((size for size in windows if size is not None), default=None)
    parts = [
        RESIDUAL[block.residual],
        "RMSNorm" if block.norm.kind == "rms" else "LayerNorm",
        f"gated MLP ({block.activation})" if ACTIVATIONS[block.activation].gated else f"MLP ({block.activation})",
        "shared keys and values" if block.key_heads < block.heads else "",
        f"norms of queries and keys ({block.qk_norm})" if block.qk_norm else "",
        "biases of queries, keys and values" if block.biases == ("qkv",) else "",
        "unscaled scores" if block.score_divisor == 1 else "",
        f"a window of {window}{' in some layers' if None in windows else ''}" if window else "",
        "capped scores and logits" if block.score_cap and config.logit_cap else "",
        "scaled embeddings" if config.embedding_scale != 1 else "",
    ]
    return ", ".join(part for part in parts if part)


def document() -> str:
    """The page with a fresh table."""
    text = DOCUMENT.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{DOCUMENT}: lacks the lines {BEGIN.strip()} and {END.strip()}")
    return before + BEGIN + "\n" + table() + "\n" + END + after


def main() -> int:
    """Writes or checks the table; the exit status."""
    fresh = document()
    if "--check" in sys.argv[1:]:
        return int(fresh != DOCUMENT.read_text(encoding="utf-8"))
    DOCUMENT.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
