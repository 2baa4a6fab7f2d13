"""Devices: what is asked of the compilers, several processes, meshes and where arrays lie."""
