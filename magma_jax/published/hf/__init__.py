"""``config.json`` of Hugging Face's language models: one function per kind to our fields, and one back."""
