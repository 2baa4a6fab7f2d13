"""Samplers of MAGVLT; each is one jitted program per shape and static setting. To get n candidates, repeat the rows."""
