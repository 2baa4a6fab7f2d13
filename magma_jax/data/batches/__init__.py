"""From dataset folders and samples to batches."""
