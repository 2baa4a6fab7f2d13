"""The optimizer step: losses, gradients, updates, and what they cost."""
