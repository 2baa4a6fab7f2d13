"""Connections: who may ask, how bodies are read, what is logged."""
