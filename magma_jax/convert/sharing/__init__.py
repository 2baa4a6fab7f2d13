"""Folders and files to share: exports, model cards, and what a run has trained alone."""
