"""Language models in GGUF files: sizes, tensor names and vocabulary as llama.cpp writes them."""
