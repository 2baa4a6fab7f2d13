"""Images, text and samples, up to the batch."""
