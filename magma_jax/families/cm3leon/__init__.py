"""CM3Leon: a decoder over text and image tokens (Yu et al. 2023). It is not among ``FAMILIES`` yet."""
