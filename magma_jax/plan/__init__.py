"""Ahead-of-time plans: a run's step compiled for a TPU topology that is not there, and what the result tells.

``python -m magma_jax.plan`` is the command, docs/plans.md its manual.
"""
