"""The library's dataset format: records, shards and dataset folders."""
