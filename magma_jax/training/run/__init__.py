"""Config of a run, and how it starts or resumes."""
