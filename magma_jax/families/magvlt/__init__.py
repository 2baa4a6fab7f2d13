"""MAGVLT: images from text, text from images, and both filled in where they are masked."""
