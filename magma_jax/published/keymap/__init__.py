"""One table of rules renames tensors in both directions."""
