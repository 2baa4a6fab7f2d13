"""The likeliest answers: beam search, and choice among given ones."""
