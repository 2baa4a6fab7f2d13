"""Encoders of texts to single vectors."""
