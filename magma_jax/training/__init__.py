"""Optimizer, step, loop, checkpoints, metrics."""
