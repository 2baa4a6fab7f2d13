"""OpenMoji drawings and text about them: the data of the quick start."""
