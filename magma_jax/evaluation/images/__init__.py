"""Tasks of models that draw: images of captions, compared with real ones as sets."""
