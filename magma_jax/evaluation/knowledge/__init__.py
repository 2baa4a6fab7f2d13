"""Questions about drawings whose answers stand in no caption: what a frozen language model knows."""
