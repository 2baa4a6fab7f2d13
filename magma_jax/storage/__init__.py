"""Arrays on disk: weight file formats, downloads, model folders, checksums."""
