"""Third-party checkpoints: published layouts and key tables."""
