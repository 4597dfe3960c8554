"""Checkpoint formats: detection and reading."""
