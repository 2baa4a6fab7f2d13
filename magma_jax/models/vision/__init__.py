"""Image encoders, one file a kind."""
