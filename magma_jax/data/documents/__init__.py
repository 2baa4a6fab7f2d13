"""Documents of text and images as one stream of tokens: packing, and the CM3 objective."""
