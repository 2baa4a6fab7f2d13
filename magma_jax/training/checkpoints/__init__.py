"""Checkpoints of a run, validation bookkeeping and the lock of the run folder."""
