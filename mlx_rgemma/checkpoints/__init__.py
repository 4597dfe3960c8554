"""Checkpoints: formats, schema, conversion, loading and saving."""
