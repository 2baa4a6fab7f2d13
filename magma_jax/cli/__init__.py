"""The commands of train.py and eval.py, and the one command that holds all others."""
