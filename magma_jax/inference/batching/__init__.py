"""Continuous batching: many requests on one model."""
