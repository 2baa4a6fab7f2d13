"""Structured output: constraints, and the grammars that enforce them."""
