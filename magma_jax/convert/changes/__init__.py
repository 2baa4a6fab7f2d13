"""Copies of a model folder with a changed language model: quantized, or with a LoRA merged, removed or added."""
