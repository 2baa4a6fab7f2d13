"""Arrays on disk: readers and writers of foreign and own files, downloads, model folders, checksums."""
