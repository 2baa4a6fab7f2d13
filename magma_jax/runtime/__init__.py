"""Devices: compiler options, multi-process runs, meshes and shardings."""
