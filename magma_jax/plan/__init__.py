"""Ahead-of-time plans: a run's step compiled for a TPU topology without TPUs, and analysed.

``python -m magma_jax.plan`` is the command, docs/plans.md its manual.
"""
