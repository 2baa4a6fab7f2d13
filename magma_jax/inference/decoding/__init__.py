"""Decoding loop and sampling, on the device."""
