"""Model config values that cannot be inferred from a checkpoint's tensors."""

# Keys of a model config file, such as the .json beside a golden file; other keys are ignored.
MODEL_CONFIG_KEYS = {
    "lm": ("n_heads", "rotary_dim", "seq_len", "layernorm_eps"),
    "encoder": ("res", "heads", "activation"),
    "adapter": ("activation",),
    "image_tokenizer": ("resolution",),
    "cm3leon": ("heads", "activation", "text", "image", "sentinels", "image_tokens"),
    "transformer": ("n_heads", "text_rows"),
}
