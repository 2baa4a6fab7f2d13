"""GGUF files, the format of llama.cpp, read without running code."""
