"""Metrics by protocol name."""
