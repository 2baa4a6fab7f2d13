"""What an evaluation found, and the files that keep it."""
