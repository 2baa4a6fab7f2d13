"""Monitoring of a run: metrics writers, throughput, profiler."""
