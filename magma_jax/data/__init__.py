"""Pictures, text and samples, up to the batch."""
