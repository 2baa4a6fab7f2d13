"""Evaluation tasks: examples, prompts, answers, scores."""
