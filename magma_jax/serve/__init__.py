"""The server: the OpenAI chat-completions shape over continuous batching, and a page to try it."""
