"""Scores of prediction files in the official formats."""
