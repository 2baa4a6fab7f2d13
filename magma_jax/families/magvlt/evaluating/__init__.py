"""Figures of a run on OpenMoji's drawings: drawing, describing, and changing an attribute, each beside controls."""
