"""From logits to tokens, step by step on the device."""
