"""PyTorch checkpoints without PyTorch."""
