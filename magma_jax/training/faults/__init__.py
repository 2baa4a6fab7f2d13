"""Handling of faults: interruption, non-finite steps, unusable samples."""
