"""Generating text: one prompt or many, token by token or several at once."""
