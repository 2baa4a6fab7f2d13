"""Key maps: rule tables that rename tensors in both directions."""
