"""What a client may ask: the fields of requests, and how they are read."""
