"""From records to a dataset folder, in parallel and resumable."""
