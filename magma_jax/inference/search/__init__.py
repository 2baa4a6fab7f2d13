"""Beam search, and choice among given answers."""
