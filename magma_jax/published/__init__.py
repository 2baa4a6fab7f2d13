"""Other people's checkpoints: the layouts they are published in."""
