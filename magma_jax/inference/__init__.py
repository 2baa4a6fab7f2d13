"""Sampling, decoding and the interface for users."""
