"""Hugging Face's layouts: ``config.json`` of language models, in both directions, and of encoders; LoRAs of PEFT."""
