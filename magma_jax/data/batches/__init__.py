"""Batches from dataset folders and samples."""
