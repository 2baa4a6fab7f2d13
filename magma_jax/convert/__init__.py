"""Checkpoint conversion from and to other libraries."""
