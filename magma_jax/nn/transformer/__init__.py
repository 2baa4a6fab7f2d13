"""One transformer for all language models: block, cache, and the trunk that stacks blocks."""
