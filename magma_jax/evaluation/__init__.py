"""Metrics by protocol name, tasks and reports."""
