"""The optimizer step: losses, gradients, updates, and their operation counts."""
