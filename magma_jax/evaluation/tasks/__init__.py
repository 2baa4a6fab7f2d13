"""Tasks: what a model is asked, and how it is answered."""
