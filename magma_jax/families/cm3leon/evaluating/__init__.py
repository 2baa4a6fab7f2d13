"""Figures of a run on OpenMoji's drawings: drawing by name, describing, edits and perplexity, each beside controls."""
