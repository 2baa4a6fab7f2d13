"""What the tensors of a checkpoint cannot tell."""

# What a model config file may hold, as in the .json beside a golden file; other keys are ignored there.
MODEL_CONFIG_KEYS = {
    "lm": ("n_heads", "rotary_dim", "seq_len", "layernorm_eps"),
    "encoder": ("res", "heads", "activation"),
    "adapter": ("activation",),
}
