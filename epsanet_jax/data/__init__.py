"""Reads images from disk and yields batches of uint8 arrays."""
