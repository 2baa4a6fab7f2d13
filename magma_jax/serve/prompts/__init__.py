"""Prompts from messages: templates, prompt wording, and images from data URIs, files and URLs."""
