"""Results of evaluations, and their files."""
