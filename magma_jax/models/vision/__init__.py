"""Image encoders, one file per kind."""
