"""MAGVLT's transformer: a bidirectional model of image codes and text (Kim et al. 2023)."""
