"""Building blocks that any model family may use."""
