"""Answers of a given form: constraints, and the grammars that hold tokens to them."""
