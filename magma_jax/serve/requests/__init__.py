"""Request schemas and their validation."""
