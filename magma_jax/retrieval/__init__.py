"""Retrieval of documents: encoders, memory banks, exact search, and annotation of data sets."""
