"""Conversion of records to dataset folders, parallel and resumable."""
